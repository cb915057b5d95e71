"""Handing out tasks, the second hot function of the label database; and looking back at what was handed out.

In a constant number of SQLAlchemy Core statements (`annotate.statements`), inside a transaction that the
caller opens and commits.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from annotate import extras
from annotate import statements as sql
from annotate.extras import Next
from annotate.form import Answers, back
from annotate.recording import as_shown
from annotate.records import draw
from annotate.rules import Rules


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


@dataclass(frozen=True)
class Place:
    """How far down the queue of a round somebody has come: what is free before it is not for them.

    So who is ahead of the others need not look past all that they alone have done. It holds until the list
    is made anew. PostgreSQL passes over slots that another's step has locked, and such a step may fail: who
    comes to the end looks once more from the head.
    """

    opened: int
    priority: float
    slot: int


HEAD = Place(-1, math.inf, -1)


def claim(x: Connection, round_id: int, me: int, want: int, place: Place = HEAD) -> tuple[list[Shown], Place]:
    """Up to `want` open tasks of annotator `me`, all with at least half a lease before them; and their place.

    Those they hold already come first, then free ones, then those whose holder's lease has run out; checks
    and repeats are among them as the rules of the round say. Nothing new where the round is paused, and
    nothing at all where it is closed.
    """
    now = time.time()
    round_ = x.execute(sql.ROUND, {"round": round_id, "me": me}).one()
    if round_.state == "closed":
        return [], place
    have: extras.Parts = extras.parts(x, round_id) if round_.rules else {"label": round_id}
    mine = x.execute(sql.MINE, {"me": me, "rounds": list(have.values()), "n": want}).all()
    if any(row.lease_until < now + round_.lease / 2 for row in mine):
        x.execute(sql.EXTEND, {"slots": [row.id for row in mine], "until": now + round_.lease})
    taken: list[Next] = []
    if len(mine) < want and round_.state == "open":
        asked = {"me": me, "round": round_id, "now": now}
        taken, place = _next(x, round_, have, asked, want - len(mine), place)
    if taken:
        x.execute(sql.TAKE, [{"slot": row.id, "who": me, "until": now + round_.lease} for row in taken])
        x.execute(sql.VIEW, [_view(row, me, round_, now) for row in taken])
    ids = [row.id for row in mine] + [row.id for row in taken]
    return _show(x, x.execute(sql.OPEN, {"slots": ids}).all(), ids), place


def _next(
    x: Connection, round_: Any, have: extras.Parts, asked: dict[str, Any], room: int, place: Place
) -> tuple[list[Next], Place]:
    """The tasks that `me` gets next, `room` of them at most, and the place behind them."""
    me = asked["me"]
    rules = Rules.model_validate(round_.rules) if round_.rules else None
    kinds = extras.plan(x, round_, rules, have, me, room) if rules else []
    wanted = kinds.count("label") + 1 if rules else room
    place = place if place.opened == round_.opened else HEAD
    rows = _available(x, asked, wanted, round_.overlap, place)
    taken = (
        extras.hand_out(x, round_, rules, have, me, kinds, rows)
        if rules
        else [Next(row.id, row.lease, row.key, row.response_ids) for row in rows]
    )
    ids = {row.id for row in taken}
    for row in rows:
        if row.id in ids and row.state == "free":
            place = Place(round_.opened, row.priority, row.id)
    return taken, place


def _available(x: Connection, asked: dict[str, Any], want: int, overlap: int, place: Place) -> list[Any]:
    """Up to `want` slots of as many tasks: free ones first, then those whose holder's lease has run out.

    A task has `overlap` slots, and nobody may hold two of them. Rows that PostgreSQL finds are locked, for
    others as good as taken, so of a task with several it is asked for one alone.
    """
    found: dict[int, Any] = {}  # by task
    searches = [(sql.FREE, place), (sql.FREE, HEAD), (sql.EXPIRED, HEAD)]
    for query, start in searches if place != HEAD else searches[1:]:
        rows: Sequence[Any] = [None]
        while rows and len(found) < want:
            missing = want - len(found)
            several = missing * overlap if x.dialect.name == "sqlite" else 1
            values = asked | {"n": missing if overlap == 1 else several, "but": list(found)}
            rows = x.execute(query, values | {"priority": start.priority, "slot": start.slot}).all()
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


def _answers_as_shown(row: Any) -> Answers:
    return Answers.model_validate(row.answers or {}).moved(back(row.display_order))


def display_order(salt: str, task: str, annotator: str, count: int) -> list[int]:
    """Canonical indices in the order shown.

    A function of its arguments: a reload changes nothing, and a simulated label does not depend on time.
    """
    return sorted(range(count), key=lambda i: draw(salt, "order", task, annotator, i))


def _view(row: Next, me: int, round_: Any, now: float) -> dict[str, Any]:
    order = row.order or display_order(round_.salt, row.key, round_.annotator, len(row.response_ids))
    return {"slot_id": row.id, "lease": row.lease + 1, "annotator_id": me, "display_order": order, "at": now}
