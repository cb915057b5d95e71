"""Rounds that people have worked on: through the store, on a clock of their own."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import insert, select, update

from annotate.queue import Label, Shown
from annotate.schema import Judgement, Slot, Task, View
from annotate.store import Store


@contextmanager
def clock(at: float) -> Iterator[None]:
    """What the label database is told the time is."""
    with patch("annotate.queue.time") as fake:
        fake.time.return_value = at
        yield


def judge(
    store: Store, round_id: int, name: str, at: float, answer: Callable[[Shown], dict[str, Any]], n: int = 1
) -> list[str]:
    """`name` labels the next `n` tasks; the tokens of the labels."""
    me, tokens = store.annotator(name), []
    with clock(at):
        for _ in range(n):
            [shown] = store.step(round_id, me, want=1)[1]
            tokens.append(f"{shown.key}-{len(tokens)}")
            assert store.step(round_id, me, [Label(token=tokens[-1], **answer(shown))]) == (["saved"], [])
    return tokens


def fill(store: Store, round_id: int, people: Sequence[str], labels: int) -> None:
    """Gives each of `people` that many labels, straight into the tables: a day's work in seconds.

    The round needs labels * len(people) slots, its overlap must divide the number of people.
    """
    ids = [store.annotator(name) for name in people]
    start = time.time() - 86_400
    with store._write() as x:
        slots = x.execute(
            select(Slot.id, Slot.number, Slot.task_id)
            .join(Task, Task.id == Slot.task_id)
            .where(Slot.round_id == round_id)
            .order_by(Slot.task_id, Slot.number)
        ).all()
        views, judgements = [], []
        for index, slot in enumerate(slots[: labels * len(ids)]):
            order = [0, 1] if slot.task_id % 3 else [1, 0]
            view = {"slot_id": slot.id, "lease": 1, "annotator_id": ids[index % len(ids)]}
            at = start + index * 86_000 / len(slots)
            views.append(view | {"display_order": order, "at": at})
            said = {"preference": (slot.task_id + index % 2) % 7 - 3, "client_ms": 3000 + index % 9000}
            judgements.append(view | said | {"rev": 0, "token": f"{slot.id}-1-x", "at": at + 5})
        taken = update(Slot.__table__).values(state="done", lease=1)  # type: ignore[arg-type]
        for who in ids:
            mine = [view["slot_id"] for view in views if view["annotator_id"] == who]
            for batch in range(0, len(mine), 500):
                x.execute(taken.where(Slot.id.in_(mine[batch : batch + 500])).values(annotator_id=who))
        x.execute(insert(View.__table__), views)  # type: ignore[arg-type]
        x.execute(insert(Judgement.__table__), judgements)  # type: ignore[arg-type]
