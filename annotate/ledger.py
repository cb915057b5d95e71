"""Every judgement of a round as columns, read on as they come in.

Judgements are append-only, so what was read once is kept, and the database is asked only for what is new.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Integer, String, and_, bindparam, cast, func, select

from annotate.agreement import POINTS, Counts
from annotate.records import ranked_pairs
from annotate.schema import Judgement, Slot, View
from annotate.store import Store

SETTLED = 60.0
"""Seconds after which no judgement with a lower id can still appear: of two transactions that write at the
same time, a database server may let the one with the higher id be seen first. Younger ones are read again."""
NOTHING = 9
"""In the place of a preference where there is none."""
GRADE_MIDDLE = 4
"""Grades 1..7 become -3..3."""
ROW = np.dtype(
    [
        *((name, np.int64) for name in ("id", "slot", "task", "who", "rev")),
        *(("preference", np.int8), ("ms", np.int64), ("at", np.float64), ("first", "U1")),
    ]
)
"""`rev` and `ms` are -1 where there is none; `first` is the canonical index of the reply shown first."""
Table = NDArray[Any]
"""Structured, of ROW."""

_JUDGEMENTS = (
    select(
        *(Judgement.id, Judgement.slot_id, Slot.task_id, Judgement.annotator_id),
        func.coalesce(Judgement.rev, -1),
        func.coalesce(Judgement.preference, NOTHING),
        func.coalesce(Judgement.client_ms, -1),
        Judgement.at,
        func.substr(cast(View.display_order, String), 2, 1),
        Judgement.answers,
    )
    .join(Slot, Slot.id == Judgement.slot_id)
    .join(View, and_(View.slot_id == Judgement.slot_id, View.lease == Judgement.lease))
    .where(
        Judgement.id > bindparam("after", type_=Integer),
        # +0: no index, else SQLite starts from all slots of the round instead of the few new judgements
        Slot.round_id + 0 == bindparam("round", type_=Integer),
    )
    .order_by(Judgement.id)
)


class Ledger:
    """Of one round; any number of threads may read it."""

    def __init__(self, store: Store, round_id: int):
        self.store, self.round_id = store, round_id
        self._lock = threading.Lock()
        self._settled: Table = np.empty(0, ROW)
        self._answers: dict[int, dict[str, Any]] = {}

    def read(self) -> "Said":
        """All that was said until now."""
        with self._lock:
            after = int(self._settled["id"][-1]) if len(self._settled) else 0
            horizon = time.time() - SETTLED
            parts = [self._settled]
            with self.store.reading() as x:
                # Without the ORM, which makes rows at half the speed; in parts, for the memory.
                found = x.connection().execute(_JUDGEMENTS, {"round": self.round_id, "after": after})
                for rows in found.partitions(10_000):
                    parts.append(np.array([tuple(row[:-1]) for row in rows], ROW))
                    self._answers |= {row[0]: row[-1] for row in rows if row[-1]}
            table = np.concatenate(parts)
            young = np.flatnonzero(table["at"][len(self._settled) :] >= horizon)
            self._settled = table[: len(self._settled) + young[0]] if len(young) else table
            return Said(table, self._answers.copy())


@dataclass(frozen=True)
class Said:
    """Everything said in a round."""

    table: Table
    """In order of id."""
    answers: dict[int, dict[str, Any]]
    """Besides the preference, by id of the judgement."""

    def current(self) -> Table:
        """The rows that count: of each slot the highest revision."""
        counting = self.table[self.table["rev"] >= 0]
        order = np.lexsort((counting["rev"], counting["slot"]))
        slots = counting["slot"][order]
        last = np.ones(len(slots), dtype=bool)
        last[:-1] = slots[1:] != slots[:-1]
        found: Table = counting[order[last]]
        return found


@dataclass(frozen=True)
class Verdicts:
    """What current labels say, on one scale.

    Preferences as they are, grades around their middle, a ranking as one comparison for every two replies.
    """

    label: NDArray[np.int64]
    """[n] index of the label among the current ones."""
    unit: NDArray[np.int64]
    """[n] numbers what was compared, from 0."""
    value: NDArray[np.int64]
    """[n] -3..3"""
    task: NDArray[np.int64]
    """[units] id of each one's task."""
    counts: Counts
    """[units, 7]"""


def verdicts(current: Table, answers: dict[int, dict[str, Any]]) -> Verdicts:
    label = np.flatnonzero(current["preference"] != NOTHING)
    found = [(label, current["task"][label] * 64, current["preference"][label].astype(np.int64))]
    more = []
    for index in np.flatnonzero(np.isin(current["id"], list(answers))) if answers else ():
        answer, task = answers[int(current["id"][index])], int(current["task"][index])
        if answer.get("rating") is not None:
            more.append((index, task * 64, answer["rating"] - GRADE_MIDDLE))
        for i, j, sign in ranked_pairs(answer.get("ranking") or []):
            more.append((index, task * 64 + i * 8 + j, sign))
    found.append(tuple(np.array(more, dtype=np.int64).reshape(-1, 3).T))  # type: ignore[arg-type]
    label, names, value = (np.concatenate(column) for column in zip(*found, strict=True))
    units, unit = np.unique(names, return_inverse=True)
    return Verdicts(label, unit, value, units // 64, _counted(unit, value))


def attributes(current: Table, answers: dict[int, dict[str, Any]]) -> dict[str, Counts]:
    """Name -> [tasks, 7] of what current labels say of it, on the scale of `Verdicts`; skips say nothing."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in current[np.isin(current["id"], list(answers))] if answers else ():
        answer = answers[int(row["id"])]
        grades = answer.get("rating") is not None
        if grades or row["preference"] != NOTHING:
            for name, value in answer.get("attributes", {}).items():
                found.setdefault(name, []).append((int(row["task"]), value - GRADE_MIDDLE * grades))
    each = {name: np.array(said).T for name, said in found.items()}
    return {
        name: _counted(np.unique(task, return_inverse=True)[1], value) for name, (task, value) in each.items()
    }


def _counted(unit: NDArray[np.int64], value: NDArray[np.int64]) -> Counts:
    """[units, 7]: how often each of -3..3 was said of each unit."""
    units = int(unit.max(initial=-1)) + 1
    return np.bincount(unit * POINTS + value + POINTS // 2, minlength=units * POINTS).reshape(-1, POINTS)
