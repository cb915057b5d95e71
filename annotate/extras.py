"""Checks and repeats: where they live, and handing them out. Inside a transaction of the caller.

They have rounds of their own, parts of the round among whose tasks they are mixed. So whatever speaks of that
round's tasks, slots and labels never meets them. A slot is made when its task is due, for that person alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Integer, and_, bindparam, func, select, update
from sqlalchemy.orm import aliased

from annotate import rounds
from annotate.form import Answers
from annotate.records import DataError, Item, draw, prompt_id
from annotate.rules import APART, EVERY, Check, Known, Purpose, Rules
from annotate.schema import Annotator, Judgement, Round, Slot, Task, View

Parts = dict[Purpose, int]
"""Ids of a round, under `label`, and of its parts."""
RECENT = 50
"""Labels among which a task to repeat is drawn."""


@dataclass(frozen=True)
class Next:
    """A task to be handed out: its slot, and the order to show where that is not drawn."""

    id: int
    lease: int
    key: str
    response_ids: list[int]
    order: list[int] | None = None


@dataclass(frozen=True)
class Answer:
    """Of someone to a check: the first one where they were told whether it was right, else the last."""

    annotator: str
    task: str
    place: int | None
    right: bool


def parts(x: Connection, round_id: int) -> Parts:
    found = x.execute(_PARTS, {"round": round_id})
    return {"label": round_id, **{row.purpose: row.id for row in found}}


def arrange(x: Connection, round_id: int, rules: Rules, checks: Sequence[Check], tasks: int) -> None:
    """Make these the rules and checks of a round that asks so many tasks. What was answered stays."""
    if rules.first > len(checks):
        raise DataError(f"qualifying takes {rules.first} checks, and there are {len(checks)}")
    mixed = len(checks) - rules.first
    among = tasks if rules.at_most is None else min(tasks, rules.at_most)
    every = max(1, min(EVERY, among // mixed)) if mixed else EVERY
    rules = rules.model_copy(update={"checks": len(checks), "every": every})
    stored = rules.model_dump() if rules != Rules() else None
    x.execute(update(Round).where(Round.id == round_id).values(rules=stored))
    have = parts(x, round_id)
    if checks or "check" in have:
        _set_checks(x, have.get("check") or _part(x, round_id, "check"), checks)
    if rules.repeats and "repeat" not in have:
        _part(x, round_id, "repeat")


def _part(x: Connection, round_id: int, purpose: Purpose) -> int:
    whole = x.execute(select(Round).where(Round.id == round_id)).one()
    shared = {name: getattr(whole, name) for name in ("kind", "lease", "salt", "state")}
    name = f"{whole.name}/{purpose}s"
    return rounds.add(x, Round, name=name, overlap=1, part_of=round_id, purpose=purpose, **shared)


def _set_checks(x: Connection, part: int, checks: Sequence[Check]) -> None:
    items = {
        check.task: Item(
            id=prompt_id(check.prompt),
            split="train",
            use="preference",
            prompt=check.prompt,
            completions=check.completions,
        )
        for check in checks
    }
    rounds.add_tasks(x, part, items)
    given = {c.task: Known(better=c.better, feedback=c.feedback, place=n) for n, c in enumerate(checks)}
    for row in x.execute(select(Task.id, Task.key, Task.known).where(Task.round_id == part)).all():
        known = given.get(row.key) or Known.model_validate({**row.known, "place": None})
        x.execute(update(Task).where(Task.id == row.id).values(known=known.model_dump()))
        asked = known.place is not None
        x.execute(update(Slot).where(Slot.task_id == row.id).values(active=asked))


def plan(x: Connection, round_: Any, rules: Rules, have: Parts, me: int, room: int) -> list[Purpose]:
    """What the next `room` tasks of `me` are for, by the rules of the round (a row of statements.ROUND)."""
    given, done = counts(x, have, me)
    if rules.qualify and given["label"] == 0:
        if given["check"] < rules.first:
            return ["check"] * min(room, rules.first - given["check"])
        if done["check"] < rules.first or not qualified(x, rules, have, me):
            return []
    handed = [given["label"], given["check"], given["repeat"]]
    due = rules.repeat_at(given["repeat"], round_.salt, round_.annotator) <= done["label"]
    again = len(_labelled(x, have, me)) if due else 0
    return rules.plan(round_.salt, round_.annotator, handed, done["label"], again, room)


def counts(x: Connection, have: Parts, me: int) -> tuple[dict[Purpose, int], dict[Purpose, int]]:
    """By purpose, how many tasks `me` was given and has not lost, and how many of them are labelled.

    Of the checks those that are still asked.
    """
    purpose = {round_id: name for name, round_id in have.items()}
    given: dict[Purpose, int] = {"label": 0, "check": 0, "repeat": 0}
    done = dict(given)
    rows = [] if "check" not in have else x.execute(_CHECK_COUNTS, {"me": me, "part": have["check"]}).all()
    others = [round_id for round_id, name in purpose.items() if name != "check"]
    for row in (*rows, *x.execute(_COUNTS, {"me": me, "rounds": others})):
        given[purpose[row.round_id]] += row.n
        done[purpose[row.round_id]] += row.n if row.state == "done" else 0
    return given, done


def qualified(x: Connection, rules: Rules, have: Parts, me: int) -> bool:
    """Whether enough of the checks that come first were answered right."""
    if rules.qualify is None or "check" not in have:
        return True
    said = answers(x, have["check"], me, first=True)  # else one could try until it is right
    asked = [answer for answer in said if answer.place is not None and answer.place < rules.first]
    return sum(answer.right for answer in asked) >= rules.qualify.right * rules.first


def hand_out(
    x: Connection,
    round_: Any,
    rules: Rules,
    have: Parts,
    me: int,
    kinds: Sequence[Purpose],
    rows: Sequence[Any],
) -> list[Next]:
    """`rows` (free slots, the first to be served first) with the checks and repeats of `kinds` among them.

    One more row than is handed out says where in the order an extra task stands.
    """
    given, taken = iter(rows), 0
    out: list[Next] = []
    for kind in kinds:
        if kind == "label":
            row = next(given, None)
            if row is None:
                break
            taken += 1
            out.append(Next(row.id, row.lease, row.key, row.response_ids))
            continue
        found = _check(x, have, me, rules, round_) if kind == "check" else _repeat(x, have, me, round_)
        if found is not None:
            task, order = found
            priority = math.nextafter(rows[taken].priority, math.inf) if taken < len(rows) else -1.0
            place = {"number": me, "reserved_id": me, "priority": priority}
            slot = rounds.add(x, Slot, task_id=task.id, round_id=have[kind], state="free", lease=0, **place)
            out.append(Next(slot, 0, task.key, task.response_ids, order))
    return out


def _check(x: Connection, have: Parts, me: int, rules: Rules, round_: Any) -> tuple[Any, None] | None:
    """The next check for `me`: the qualifying ones as they stand in the file, the others as drawn."""
    if "check" not in have:
        return None

    def turn(row: Any) -> tuple[float, float]:
        place = row.known["place"]
        return min(place, rules.first), draw(round_.salt, "check", round_.annotator, row.key)

    rows = [r for r in x.execute(_CHECKS, {"part": have["check"], "me": me}) if r.known["place"] is not None]
    return (min(rows, key=turn), None) if rows else None


def _repeat(x: Connection, have: Parts, me: int, round_: Any) -> tuple[Any, list[int]] | None:
    """A task that `me` labelled some time ago, and the reverse of the order it was shown in."""
    part, rows = have["repeat"], _labelled(x, have, me)
    if not rows:
        return None
    row = min(rows, key=lambda row: draw(round_.salt, "repeat", round_.annotator, row.key))
    same = select(Task.id, Task.key, Task.response_ids).where(Task.round_id == part, Task.key == row.key)
    if x.execute(same).first() is None:
        # Another may be adding it. Whoever adds holds the part, so that nobody can wait in a circle.
        x.execute(select(Round.id).where(Round.id == part).with_for_update(key_share=True))
        texts = {"prompt_id": row.prompt_id, "response_ids": row.response_ids, "policies": row.policies}
        rounds.add_missing(x, Task, [{"round_id": part, "key": row.key, **texts}])
    return x.execute(same).one(), row.display_order[::-1]


def _labelled(x: Connection, have: Parts, me: int) -> list[Any]:
    """Tasks that `me` gave a verdict on some time ago, and was not asked again."""
    values = {"me": me, "round": have["label"], "part": have["repeat"]}
    return [row for row in x.execute(_LABELLED, values) if not row.again and _verdict(row)]


def _verdict(row: Any) -> bool:
    said = row.answers or {}
    return row.preference is not None or bool(said.get("ranking")) or said.get("rating") is not None


def answers(x: Connection, part: int, me: int | None = None, first: bool = False) -> list[Answer]:
    """Answers to the checks of this part by everyone, or by `me`; sorted by annotator and task.

    `first`: the first answer to each, whether they were told or not.
    """
    query = _ANSWERS.where(Slot.round_id == part)
    if me is not None:
        query = query.where(Slot.annotator_id == me)
    counted: dict[int, Answer] = {}
    for row in x.execute(query):
        known = Known.model_validate(row.known)
        if row.slot_id not in counted or (known.feedback is None and not first):
            right = known.right(row.preference, Answers.model_validate(row.answers or {}))
            counted[row.slot_id] = Answer(row.name, row.key, known.place, right)
    return sorted(counted.values(), key=lambda answer: (answer.annotator, answer.task))


def feedback(x: Connection, me: int, tokens: Sequence[str]) -> list[tuple[str, bool, str]]:
    """(token, right, text) of those among these that are first answers of `me` to checks with feedback."""
    told = []
    for row in x.execute(_TOLD, {"tokens": tokens, "me": me}):
        known = Known.model_validate(row.known)
        if known.feedback is not None:
            right = known.right(row.preference, Answers.model_validate(row.answers or {}))
            told.append((row.token, right, known.feedback))
    return told


_me, _round, _part_id = (bindparam(name, type_=Integer) for name in ("me", "round", "part"))
_PARTS = select(Round.id, Round.purpose).where(Round.part_of == _round)
_COUNTS = (
    select(Slot.round_id, Slot.state, func.count().label("n"))
    .where(Slot.annotator_id == _me, Slot.round_id.in_(bindparam("rounds", expanding=True)))
    .group_by(Slot.round_id, Slot.state)
)
_CHECK_COUNTS = (
    select(Slot.round_id, Slot.state, func.count().label("n"))
    .where(Slot.annotator_id == _me, Slot.round_id == _part_id, Slot.active)
    .group_by(Slot.round_id, Slot.state)
)
_CHECKS = select(Task.id, Task.key, Task.response_ids, Task.known).where(
    Task.round_id == _part_id,
    ~select(Slot.id).where(Slot.task_id == Task.id, Slot.number == _me).exists(),
)
_repeat_task, _repeat_slot = aliased(Task), aliased(Slot)
_LABELLED = (
    select(Task.key, Task.prompt_id, Task.response_ids, Task.policies, View.display_order)
    .add_columns(Judgement.preference, Judgement.answers)
    .add_columns(
        select(_repeat_slot.id)
        .join(_repeat_task, _repeat_task.id == _repeat_slot.task_id)
        .where(_repeat_task.round_id == _part_id, _repeat_task.key == Task.key, _repeat_slot.number == _me)
        .exists()
        .label("again")
    )
    .join(Slot, Slot.id == Judgement.slot_id)
    .join(Task, Task.id == Slot.task_id)
    .join(View, and_(View.slot_id == Judgement.slot_id, View.lease == Judgement.lease))
    .where(Judgement.annotator_id == _me, Judgement.rev == 0, Slot.round_id == _round)
    .order_by(Judgement.id.desc())
    .offset(APART)
    .limit(RECENT)
)
_ANSWERS = (
    select(Judgement.slot_id, Judgement.preference, Judgement.answers, Annotator.name, Task.key, Task.known)
    .join(Slot, Slot.id == Judgement.slot_id)
    .join(Task, Task.id == Slot.task_id)
    .join(Annotator, Annotator.id == Judgement.annotator_id)
    .where(Judgement.rev.is_not(None))
    .order_by(Judgement.slot_id, Judgement.rev)
)
_TOLD = (
    select(Judgement.token, Judgement.preference, Judgement.answers, Task.known)
    .join(Slot, Slot.id == Judgement.slot_id)
    .join(Task, Task.id == Slot.task_id)
    .join(Round, Round.id == Slot.round_id)
    .where(Judgement.token.in_(bindparam("tokens", expanding=True)), Judgement.annotator_id == _me)
    .where(Judgement.rev == 0, Round.purpose == "check")
    .order_by(Judgement.id)
)
