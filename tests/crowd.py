"""Rounds that people have worked on: through the store, on a clock of their own."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import insert, select

from annotate.queue import Shown
from annotate.recording import Label
from annotate.records import Item
from annotate.schema import Judgement, Slot, Task, View
from annotate.store import Store


@contextmanager
def clock(at: float) -> Iterator[None]:
    """What the label database is told the time is."""
    with patch("annotate.queue.time") as claimed, patch("annotate.recording.time") as recorded:
        claimed.time.return_value = recorded.time.return_value = at
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


def fill(store: Store, item: Item, people: Sequence[str], labels: int, overlap: int = 2) -> int:
    """A round in which each of `people` has given that many labels, straight into the tables; its id.

    All tasks have the texts of `item`. `overlap` must divide the number of people.
    """
    ids, round_id = [store.annotator(name) for name in people], store.open_round("filled", [item])
    start, count = time.time() - 86_400, labels * len(people)
    with store.transaction() as x:
        first = x.execute(select(Task).where(Task.round_id == round_id)).one()
        shared = {"round_id": round_id, "prompt_id": first.prompt_id, "response_ids": first.response_ids}
        tasks = [
            {"id": first.id + 1 + n, "key": f"{n:016x}", "policies": [], **shared}
            for n in range(count // overlap)
        ]
        slots, views, judgements = [], [], []
        for n in range(count):
            task, who, at = tasks[n // overlap]["id"], ids[n % len(ids)], start + 80_000 * n / count
            held = {"annotator_id": who, "lease": 1}
            slot = {
                "id": 10 + n,
                "task_id": task,
                "round_id": round_id,
                "number": n % overlap,
                "priority": 0.5,
            }
            slots.append(slot | held | {"state": "done"})
            order = [0, 1] if (task + n % overlap) % 3 else [1, 0]
            views.append(held | {"slot_id": 10 + n, "display_order": order, "at": at})
            said = {"preference": (task + n % overlap) % 7 - 3, "client_ms": 3000 + n % 9000, "rev": 0}
            judgements.append(held | said | {"slot_id": 10 + n, "token": f"{10 + n}-1-x", "at": at + 5})
        for table, rows in ((Task, tasks), (Slot, slots), (View, views), (Judgement, judgements)):
            x.execute(insert(table.__table__), rows)  # type: ignore[arg-type]
    return round_id
