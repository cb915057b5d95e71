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
    return [(prompt_id(item.prompt), hashlib.sha256(t.encode()).hexdigest()) for t in item.completions]


_RESPONSES = select(Response.prompt_id, Response.sha, Response.id).where(
    Response.prompt_id.in_(bindparam("prompts", expanding=True))
)


def add_slots(
    x: Connection, round_id: int, tasks: Mapping[str, int], overlap: int, names: Mapping[str, int], salt: str
) -> None:
    """Give each task its `overlap` slots, and make these, with all that are labelled, the ones that count."""
    have = {
        tuple(row) for row in x.execute(select(Slot.task_id, Slot.number).where(Slot.round_id == round_id))
    }
    rows = []
    for key, task in tasks.items():
        drawn = sorted(names, key=lambda who, key=key: draw(salt, "assign", key, who))  # type: ignore[misc]
        for number in range(overlap):
            reserved = names[drawn[number]] if drawn else None
            if (task, number) not in have:
                row = {"task_id": task, "round_id": round_id, "number": number, "reserved_id": reserved}
                rows.append({**row, "priority": draw(salt, "queue", key)})
    if rows:
        x.execute(insert(Slot), rows)
    x.execute(update(Slot).where(Slot.round_id == round_id).values(active=False))
    if tasks:
        x.execute(_ACTIVATE, [{"task": task, "overlap": overlap} for task in tasks.values()])


_ACTIVATE = (
    update(Slot.__table__)  # type: ignore[arg-type]
    .where(Slot.task_id == bindparam("task"), or_(Slot.number < bindparam("overlap"), Slot.state == "done"))
    .values(active=True)
)
