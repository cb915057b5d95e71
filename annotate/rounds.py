"""What a round asks: its tasks, and the slots that labels go into. Inside a transaction of the caller."""

import hashlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, bindparam, insert, or_, select, update

from annotate.records import Item, draw, prompt_id
from annotate.schema import Base, Prompt, Response, Slot, Task


def add(x: Connection, table: type[Base], **values: Any) -> int:
    key = x.execute(insert(table.__table__).values(**values)).inserted_primary_key  # type: ignore[arg-type]
    assert key is not None
    return int(key[0])


def add_tasks(x: Connection, round_id: int, items: Mapping[str, Item]) -> dict[str, int]:
    """Task ids of all `items` (by task key), adding the tasks, prompts and responses that are new."""
    known = {row.key: row.id for row in x.execute(select(Task.key, Task.id).where(Task.round_id == round_id))}
    new = {key: item for key, item in items.items() if key not in known}
    prompts = {prompt_id(item.prompt): [m.model_dump() for m in item.prompt] for item in new.values()}
    if prompts:
        x.execute(
            insert(Prompt).prefix_with("OR IGNORE"), [{"id": i, "messages": m} for i, m in prompts.items()]
        )
    for key, item in new.items():
        prompt = prompt_id(item.prompt)
        responses = [_response(x, prompt, text) for text in item.completions]
        row = {"round_id": round_id, "key": key, "prompt_id": prompt, "policies": item.policies}
        known[key] = add(x, Task, response_ids=responses, **row)
    return {key: known[key] for key in items}


def _response(x: Connection, prompt: str, text: str) -> int:
    sha = hashlib.sha256(text.encode()).hexdigest()
    found = x.execute(_RESPONSE, {"prompt": prompt, "sha": sha}).scalar()
    return int(found) if found else add(x, Response, prompt_id=prompt, sha=sha, text=text)


_RESPONSE = select(Response.id).where(
    Response.prompt_id == bindparam("prompt"), Response.sha == bindparam("sha")
)


def add_slots(
    x: Connection,
    round_id: int,
    tasks: Mapping[str, int],
    overlap: int,
    names: Mapping[str, int],
    salt: str,
    order: Mapping[str, float],
) -> None:
    """Give each task its `overlap` slots, and make these, with all that are labelled, the ones that count.

    `order` is that of `ranked`: what is not labelled yet is served in it.
    """
    columns = (Slot.id, Slot.task_id, Slot.number, Slot.state, Slot.priority)
    have = {
        (row.task_id, row.number): row for row in x.execute(select(*columns).where(Slot.round_id == round_id))
    }
    rows, moved = [], []
    for key, task in tasks.items():
        drawn = sorted(names, key=lambda who, key=key: draw(salt, "assign", key, who))  # type: ignore[misc]
        for number in range(overlap):
            reserved = names[drawn[number]] if drawn else None
            old = have.get((task, number))
            if old is None:
                row = {"task_id": task, "round_id": round_id, "number": number, "reserved_id": reserved}
                rows.append({**row, "priority": order[key]})
            elif old.state != "done" and old.priority != order[key]:
                moved.append({"slot": old.id, "to": order[key]})
    if rows:
        x.execute(insert(Slot), rows)
    if moved:
        x.execute(_MOVE, moved)
    x.execute(update(Slot).where(Slot.round_id == round_id).values(active=False))
    if tasks:
        x.execute(_ACTIVATE, [{"task": task, "overlap": overlap} for task in tasks.values()])


def ranked(items: Mapping[str, Item], salt: str) -> dict[str, float]:
    """Task key -> number by which slots are served, highest first: the draw, plus the rank of a priority."""
    given = sorted({item.priority for item in items.values() if item.priority is not None})
    rank = {priority: place for place, priority in enumerate(given, 1)}
    return {
        key: draw(salt, "queue", key) + (0 if item.priority is None else rank[item.priority])
        for key, item in items.items()
    }


_MOVE = (
    update(Slot.__table__)  # type: ignore[arg-type]
    .where(Slot.id == bindparam("slot"))
    .values(priority=bindparam("to"))
)
_ACTIVATE = (
    update(Slot.__table__)  # type: ignore[arg-type]
    .where(Slot.task_id == bindparam("task"), or_(Slot.number < bindparam("overlap"), Slot.state == "done"))
    .values(active=True)
)
