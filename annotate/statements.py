"""The statements of `annotate.recording`, `annotate.queue` and `annotate.store`, built once."""

from sqlalchemy import (
    BigInteger,
    Float,
    Integer,
    and_,
    bindparam,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import aliased

from annotate.schema import (
    Annotator,
    FormText,
    Guideline,
    Judgement,
    Prompt,
    Response,
    Round,
    Slot,
    Task,
    View,
)

_me, _round, _n = (bindparam(name, type_=Integer) for name in ("me", "round", "n"))
_rounds = bindparam("rounds", type_=Integer, expanding=True)
_slots = bindparam("slots", type_=BigInteger, expanding=True)
_other = aliased(Slot)
_first = aliased(Judgement)

ROUND = (
    select(Round.lease, Round.overlap, Round.salt, Round.state, Round.rules, Round.opened)
    .add_columns(Annotator.name.label("annotator"))
    .join(Annotator, Annotator.id == _me)
    .where(Round.id == _round)
)
QUEUE = select(Annotator.id).where(Annotator.id == _me).with_for_update(key_share=True)
LOCK = (
    select(Slot.id)
    .where(or_(Slot.id.in_(_slots), and_(Slot.annotator_id == _me, Slot.state == "open")))
    .order_by(Slot.id)
    .with_for_update(key_share=True)
)
# A literal here too: with a parameter SQLite plans anew each time, as its value may make a partial index fit.
# And IS NOT, which no index has: it is those of `me` that are few, not the active ones or the open ones.
MINE = (
    select(Slot.id, Slot.lease_until)
    .where(Slot.annotator_id == _me, Slot.round_id.in_(_rounds), Slot.state == literal_column("'open'"))
    .where(Slot.active.is_not(false()))
    .order_by(Slot.priority.desc(), Slot.id)
    .limit(_n)
)
# Not NOT EXISTS: PostgreSQL would join all free slots with all of `me`, and sort, to find the first of them.
_held = select(func.count(_other.id)).where(_other.annotator_id == _me, _other.task_id == Slot.task_id)
AVAILABLE = (
    select(Slot.id, Slot.task_id, Slot.lease, Slot.priority, Slot.state, Task.key, Task.response_ids)
    .join(Task, Task.id == Slot.task_id)
    .where(
        Slot.round_id == _round,
        or_(Slot.reserved_id.is_(None), Slot.reserved_id == _me),
        _held.correlate(Slot).scalar_subquery() == 0,
        Slot.task_id.not_in(bindparam("but", expanding=True)),
    )
    .limit(_n)
    .with_for_update(
        of=Slot, key_share=True, skip_locked=True
    )  # SQLite holds the whole file, and leaves it out
)
# Literal conditions, as the partial indexes have them: with a parameter they would not be used.
_active = Slot.active == true()
_priority, _slot = bindparam("priority", type_=Float), bindparam("slot", type_=BigInteger)
FREE = (
    AVAILABLE.where(Slot.state == literal_column("'free'"), _active)
    .where(Slot.priority <= _priority, or_(Slot.priority < _priority, Slot.id > _slot))  # the index seeks
    .order_by(Slot.priority.desc(), Slot.id)
)
EXPIRED = AVAILABLE.where(
    Slot.state == literal_column("'open'"), _active, Slot.lease_until < bindparam("now")
).order_by(Slot.lease_until)
EXTEND = update(Slot).where(Slot.id.in_(_slots)).values(lease_until=bindparam("until"))
TAKE = (
    update(Slot.__table__)  # type: ignore[arg-type]
    .where(Slot.id == bindparam("slot"))
    .values(state="open", annotator_id=bindparam("who"), lease=Slot.lease + 1, lease_until=bindparam("until"))
)
VIEW = insert(View.__table__)  # type: ignore[arg-type]
HELD = (
    select(View.slot_id, View.lease, View.display_order, Task.key, Task.response_ids, Prompt.messages)
    .join(Slot, and_(Slot.id == View.slot_id, Slot.lease == View.lease))
    .join(Task, Task.id == Slot.task_id)
    .join(Prompt, Prompt.id == Task.prompt_id)
)
OPEN = HELD.where(Slot.id.in_(_slots))
HELD_BY = OPEN.where(View.annotator_id == _me, Slot.round_id.in_(_rounds))
TEXTS = select(Response.id, Response.text).where(Response.id.in_(bindparam("ids", expanding=True)))
SHOWN = (
    select(View.slot_id, View.lease, View.display_order)
    .add_columns(
        and_(Slot.lease == View.lease, Slot.annotator_id == _me, Round.state != "closed").label("held"),
        select(func.coalesce(func.max(Judgement.rev) + 1, 0))
        .where(Judgement.slot_id == View.slot_id)
        .correlate(View)
        .scalar_subquery()
        .label("next_rev"),
    )
    .join(Slot, Slot.id == View.slot_id)
    .join(Round, Round.id == Slot.round_id)
    .where(View.slot_id.in_(_slots), View.annotator_id == _me)
)
SEEN = select(Judgement.token).where(Judgement.token.in_(bindparam("tokens", expanding=True)))
JUDGE = insert(Judgement.__table__).values(  # type: ignore[arg-type]
    guidelines=select(Guideline.sha).where(Guideline.sha == bindparam("read")).scalar_subquery()
)
DONE = update(Slot).where(Slot.id.in_(_slots)).values(state="done", lease_until=None)
_last = aliased(Judgement)
FORMS = select(FormText.sha, FormText.form).where(FormText.sha.in_(bindparam("shas", expanding=True)))
HISTORY = (
    HELD.add_columns(_last.preference, _last.both_bad, _last.answers)
    .join(_first, and_(_first.slot_id == Slot.id, _first.rev == 0))
    .join(_last, _last.slot_id == Slot.id)
    .where(_first.annotator_id == _me, Slot.round_id.in_(_rounds))
    .where(
        _last.rev
        == select(func.max(Judgement.rev))
        .where(Judgement.slot_id == Slot.id)
        .correlate(Slot)
        .scalar_subquery()
    )
    .order_by(_first.id.desc())
    .limit(_n)
)
_later, _part_task = aliased(Judgement), aliased(Task)
LABELS = (
    select(Task.key, Annotator.name, Judgement.preference, Judgement.answers, View.display_order)
    .join(View, and_(View.slot_id == Judgement.slot_id, View.lease == Judgement.lease))
    .join(Slot, Slot.id == Judgement.slot_id)
    .join(Task, Task.id == Slot.task_id)
    .join(Annotator, Annotator.id == Judgement.annotator_id)
    .where(Slot.round_id == _round, Judgement.rev.is_not(None))
    .where(
        ~select(_later.id).where(_later.slot_id == Judgement.slot_id, _later.rev > Judgement.rev).exists(),
    )
)
LABELS_OF_PART = LABELS.where(
    Task.key.in_(select(_part_task.key).where(_part_task.round_id == bindparam("part", type_=Integer)))
)
