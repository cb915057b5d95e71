"""The two hot functions of the label database: record labels, hand out tasks.

Both take batches, in a constant number of SQLAlchemy Core statements (`annotate.statements`), inside a
transaction that the caller opens and commits.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from sqlalchemy import Connection

from annotate import extras
from annotate import statements as sql
from annotate.extras import Next
from annotate.form import Answers, Closed, Form, Written, back, fault
from annotate.keys import plain
from annotate.records import DataError, draw
from annotate.rules import Rules

TOKEN = re.compile(r"(\d{1,19})-(\d{1,9})-[0-9a-z]{1,20}", re.ASCII)
"""slot - lease - anything that tells this attempt from others. A retry must send the same token."""

KEY = Annotated[str, Field(pattern=r"^[0-9]{1,19}-[0-9]{1,9}$")]
"""slot - lease"""
Status = Literal["saved", "duplicate", "late", "refused"]
"""duplicate: this token was recorded before. late: the task had gone to someone else, or the round
was closed; kept, not counted.
refused: the task was never shown to this annotator; nothing is kept."""


class Label(Closed):
    """What an annotator said of a task as shown: positive says the one shown FIRST is better, 0 is a tie."""

    token: Annotated[str, Field(pattern=f"^{TOKEN.pattern}$")]
    preference: Annotated[int, Field(ge=-3, le=3)] | None
    """None: skipped, or the form asks for no comparison."""
    answers: Answers = Answers()
    form: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """That was filled in, as `Store.form` names it; None: the plain comparison."""
    both_bad: bool = False
    """A tie because neither is any good."""
    reason: Annotated[str, Field(max_length=2000), Written] | None = None
    guidelines: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """Those read before, as `Store.guidelines` names them."""
    client_ms: Annotated[int, Field(ge=0, le=10**10)] | None = None
    """Milliseconds from showing the task to the key."""

    @model_validator(mode="after")
    def _both_bad_is_a_tie(self) -> Self:
        if self.both_bad and self.preference != 0:
            raise ValueError("both_bad is a tie: preference 0")
        return self


@dataclass(frozen=True)
class Shown:
    """A task as it is shown to one annotator."""

    key: str
    """slot - lease. A label's token is this, a dash, and 1 to 20 letters or digits."""
    task: str
    messages: list[dict[str, str]]
    completions: list[str]
    """In the order shown."""


@dataclass(frozen=True)
class Past:
    """A task that was labelled, with the current label in the order shown."""

    shown: Shown
    preference: int | None
    both_bad: bool
    answers: Answers


def lock(x: Connection, me: int, labels: Sequence[Label], secret: str) -> None:
    """Hold annotator `me`, so that their requests queue, and the slots they label or have open.

    Whoever waits for a slot does so here, in the order of ids, so nobody can wait in a circle. SQLite holds
    the whole file instead.
    """
    if x.dialect.name != "sqlite":
        x.execute(sql.QUEUE, {"me": me})
        x.execute(sql.LOCK, {"me": me, "slots": {_split(plain(secret, label.token))[0] for label in labels}})


def record(x: Connection, me: int, labels: Sequence[Label], secret: str) -> list[Status]:
    """Append the labels of annotator `me` and close their slots. One status for each label.

    Whatever round a label is of, it is kept there: a page may have been open since before another was served.
    Tokens may be hidden with `secret` (annotate.keys).

    Raises DataError, and records none, where one does not answer its form.
    """
    forms = _forms(x, labels)
    keys = [_split(plain(secret, label.token)) for label in labels]
    slots = {s for s, _ in keys}
    shown = {(r.slot_id, r.lease): r for r in x.execute(sql.SHOWN, {"slots": slots, "me": me})}
    revision: dict[int, int] = {}
    seen = set(x.execute(sql.SEEN, {"tokens": [label.token for label in labels]}).scalars())

    statuses: list[Status] = []
    rows = []
    for label, key in zip(labels, keys, strict=True):
        view = shown.get(key)
        rev = None
        if view is None:
            statuses.append("refused")
            continue
        if label.token in seen:
            statuses.append("duplicate")
            continue
        wrong = fault(forms[label.form], label.preference, label.answers, len(view.display_order))
        if wrong:
            raise DataError(f"label {label.token}: {wrong}")
        if view.held:
            rev = revision.get(view.slot_id, view.next_rev)
            revision[view.slot_id] = rev + 1
        seen.add(label.token)
        statuses.append("late" if rev is None else "saved")
        rows.append(_row(label, view, me, rev))
    if rows:
        x.execute(sql.JUDGE, rows)
        x.execute(sql.DONE, {"slots": [row["slot_id"] for row in rows if row["rev"] is not None]})
    return statuses


def claim(x: Connection, round_id: int, me: int, want: int) -> list[Shown]:
    """Up to `want` open tasks of annotator `me`, all with at least half a lease before them.

    Those they hold already come first, then free ones, then those whose holder's lease has run out; checks
    and repeats are among them as the rules of the round say. Nothing new where the round is paused, and
    nothing at all where it is closed.
    """
    now = time.time()
    round_ = x.execute(sql.ROUND, {"round": round_id, "me": me}).one()
    if round_.state == "closed":
        return []
    have: extras.Parts = extras.parts(x, round_id) if round_.rules else {"label": round_id}
    mine = x.execute(sql.MINE, {"me": me, "rounds": list(have.values()), "n": want}).all()
    if any(row.lease_until < now + round_.lease / 2 for row in mine):
        x.execute(sql.EXTEND, {"slots": [row.id for row in mine], "until": now + round_.lease})
    taken: list[Next] = []
    if len(mine) < want and round_.state == "open":
        taken = _next(x, round_, have, me, want - len(mine), now)
    if taken:
        x.execute(sql.TAKE, [{"slot": row.id, "who": me, "until": now + round_.lease} for row in taken])
        x.execute(sql.VIEW, [_view(row, me, round_, now) for row in taken])
    ids = [row.id for row in mine] + [row.id for row in taken]
    return _show(x, x.execute(sql.OPEN, {"slots": ids}).all(), ids)


def _next(x: Connection, round_: Any, have: extras.Parts, me: int, room: int, now: float) -> list[Next]:
    """The tasks that `me` gets next, `room` of them at most."""
    rules = Rules.model_validate(round_.rules) if round_.rules else None
    kinds = extras.plan(x, round_, rules, have, me, room) if rules else []
    wanted = kinds.count("label") + 1 if rules else room
    rows = _available(x, {"me": me, "round": have["label"], "now": now}, wanted, round_.overlap)
    if rules is None:
        return [Next(row.id, row.lease, row.key, row.response_ids) for row in rows]
    return extras.hand_out(x, round_, rules, have, me, kinds, rows)


def _available(x: Connection, asked: dict[str, Any], want: int, overlap: int) -> list[Any]:
    """Up to `want` slots of as many tasks: free ones first, then those whose holder's lease has run out.

    A task has `overlap` slots, and nobody may hold two of them. Rows that PostgreSQL finds are locked, for
    others as good as taken, so of a task with several it is asked for one alone.
    """
    found: dict[int, Any] = {}  # by task
    for query in (sql.FREE, sql.EXPIRED):
        rows: Sequence[Any] = [None]
        while rows and len(found) < want:
            missing = want - len(found)
            several = missing * overlap if x.dialect.name == "sqlite" else 1
            values = asked | {"n": missing if overlap == 1 else several, "but": list(found)}
            rows = x.execute(query, values).all()
            for row in rows:
                found.setdefault(row.task_id, row)
    return list(found.values())[: max(want, 0)]


def history(x: Connection, round_id: int, me: int, limit: int) -> list[Past]:
    """The last tasks annotator `me` labelled, oldest first."""
    rounds = list(extras.parts(x, round_id).values())
    rows = x.execute(sql.HISTORY, {"rounds": rounds, "me": me, "n": limit}).all()[::-1]
    shown = _show(x, rows, [row.slot_id for row in rows])
    return [
        Past(task, as_shown(row.preference, row.display_order), row.both_bad, _answers_as_shown(row))
        for task, row in zip(shown, rows, strict=True)
    ]


def held(x: Connection, round_id: int, me: int, keys: Sequence[str]) -> list[Shown]:
    """Those of these tasks (`Shown.key`) that are annotator `me`'s, open or labelled."""
    slots = {int(key.split("-")[0]) for key in keys}
    rounds = list(extras.parts(x, round_id).values())
    rows = x.execute(sql.HELD_BY, {"slots": slots, "rounds": rounds, "me": me}).all()
    return [shown for shown in _show(x, rows, [row.slot_id for row in rows]) if shown.key in keys]


def _show(x: Connection, rows: Sequence[Any], slots: Sequence[int]) -> list[Shown]:
    """`rows` (slot_id, lease, display_order, key, response_ids, messages) with their texts, as `slots` go."""
    ids = {i for row in rows for i in row.response_ids}
    texts = {r.id: r.text for r in x.execute(sql.TEXTS, {"ids": ids})}
    by_slot = {
        row.slot_id: Shown(
            key=f"{row.slot_id}-{row.lease}",
            task=row.key,
            messages=row.messages,
            completions=[texts[row.response_ids[i]] for i in row.display_order],
        )
        for row in rows
    }
    return [by_slot[slot] for slot in slots]


def _forms(x: Connection, labels: Sequence[Label]) -> dict[str | None, Form]:
    """The forms that these labels fill in."""
    known: dict[str | None, Form] = {None: Form()}
    asked = {label.form for label in labels if label.form is not None}
    if asked:
        known |= {row.sha: _parsed(row.form) for row in x.execute(sql.FORMS, {"shas": asked})}
    if missing := asked - known.keys():
        raise DataError(f"form {min(missing)} is not known here")
    return known


@lru_cache(maxsize=64)
def _parsed(form: str) -> Form:
    return Form.model_validate_json(form)


def _answers_as_shown(row: Any) -> Answers:
    return Answers.model_validate(row.answers or {}).moved(back(row.display_order))


def as_shown(preference: int | None, order: Sequence[int]) -> int | None:
    """A preference between two completions, from canonical order to the order shown, and as well back."""
    return None if preference is None else preference if order[0] == 0 else -preference


def display_order(salt: str, task: str, annotator: str, count: int) -> list[int]:
    """Canonical indices in the order shown.

    A function of its arguments: a reload changes nothing, and a simulated label does not depend on time.
    """
    return sorted(range(count), key=lambda i: draw(salt, "order", task, annotator, i))


def _split(token: str) -> tuple[int, int]:
    slot, lease, _ = token.split("-")
    return int(slot), int(lease)


def _row(label: Label, view: Any, me: int, rev: int | None) -> dict[str, Any]:
    return {
        "slot_id": view.slot_id,
        "lease": view.lease,
        "annotator_id": me,
        "rev": rev,
        "token": label.token,
        "preference": as_shown(label.preference, view.display_order),
        "answers": _stored(label.answers.moved(view.display_order)),
        "form": label.form,
        "both_bad": label.both_bad,
        "reason": label.reason,
        "read": label.guidelines,
        "client_ms": label.client_ms,
        "at": time.time(),
    }


def _stored(answers: Answers) -> dict[str, Any] | None:
    return answers.model_dump(exclude_defaults=True) or None


def _view(row: Next, me: int, round_: Any, now: float) -> dict[str, Any]:
    order = row.order or display_order(round_.salt, row.key, round_.annotator, len(row.response_ids))
    return {"slot_id": row.id, "lease": row.lease + 1, "annotator_id": me, "display_order": order, "at": now}
