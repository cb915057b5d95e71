"""What a round asks: its tasks, and the slots that labels go into. Inside a transaction of the caller."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, insert, or_, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from annotate.records import Item, draw, prompt_id
from annotate.schema import Base, Prompt, Response, Slot, Task


def add(x: Connection, table: type[Base], **values: Any) -> int:
    key = x.execute(insert(table.__table__).values(**values)).inserted_primary_key  # type: ignore[arg-type]
    assert key is not None
    return int(key[0])


def add_missing(x: Connection, table: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Add those of `rows` whose key is not there."""
    new = sqlite.insert(table) if x.dialect.name == "sqlite" else postgresql.insert(table)
    x.execute(new.on_conflict_do_nothing(), rows)


def lock(x: Connection) -> None:
    """Let nobody else open a round or take a step until this transaction ends; on SQLite nobody can."""
    if x.dialect.name != "sqlite":
        x.execute(text("LOCK TABLE slots IN EXCLUSIVE MODE"))


def add_tasks(x: Connection, round_id: int, items: Mapping[str, Item]) -> dict[str, int]:
    """Task ids of all `items` (by task key), adding the tasks, prompts and responses that are new."""
    tasks = select(Task.key, Task.id).where(Task.round_id == round_id)
    known = {row.key: row.id for row in x.execute(tasks)}
    new = {key: item for key, item in items.items() if key not in known}
    if new:
        prompts = {prompt_id(item.prompt): [m.model_dump() for m in item.prompt] for item in new.values()}
        add_missing(x, Prompt, [{"id": i, "messages": m} for i, m in prompts.items()])
        responses = _responses(x, new.values())
        rows = [
            {
                "round_id": round_id,
                "key": key,
                "prompt_id": prompt_id(item.prompt),
                "response_ids": [responses[response] for response in _named(item)],
                "policies": item.policies,
            }
            for key, item in new.items()
        ]
        x.execute(insert(Task), rows)
        known = {row.key: row.id for row in x.execute(tasks)}
    return {key: known[key] for key in items}


def _responses(x: Connection, items: Collection[Item]) -> dict[tuple[str, str], int]:
    """Ids of the completions of `items` by (prompt, digest), adding those that are new."""
    rows = [
        {"prompt_id": prompt, "sha": sha, "text": reply}
        for item in items
        for (prompt, sha), reply in zip(_named(item), item.completions, strict=True)
    ]
    add_missing(x, Response, rows)
    prompts = sorted({row["prompt_id"] for row in rows})
    ids: dict[tuple[str, str], int] = {}
    for start in range(0, len(prompts), 500):  # a statement takes only so many values
        found = x.execute(_RESPONSES, {"prompts": prompts[start : start + 500]})
        ids |= {(row.prompt_id, row.sha): row.id for row in found}
    return ids


def _named(item: Item) -> list[tuple[str, str]]:
    prompt = prompt_id(item.prompt)
    return [(prompt, hashlib.sha256(t.encode()).hexdigest()) for t in item.completions]


_RESPONSES = select(Response.prompt_id, Response.sha, Response.id).where(
    Response.prompt_id.in_(bindparam("prompts", expanding=True))
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
