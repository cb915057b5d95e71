"""Keeping the labels safe: a copy of the database while people work, and a check that it is sound."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from annotate.engine import fault, open_engine, printable
from annotate.records import DataError
from annotate.schema import VERSION

_COUNTED = """
    SELECT count(DISTINCT slot_id) FROM judgements JOIN slots ON slots.id = slot_id
    JOIN rounds ON rounds.id = slots.round_id WHERE rev IS NOT NULL AND purpose = '{}'"""
COUNTS = {
    "rounds": "SELECT count(*) FROM rounds",
    "tasks": "SELECT count(*) FROM tasks",
    "annotators": "SELECT count(*) FROM annotators",
    "labels that count": _COUNTED.format("label"),
    "answers to checks": _COUNTED.format("check"),
    "repeats": _COUNTED.format("repeat"),
    "said in all": "SELECT count(*) FROM judgements",
    "came too late": "SELECT count(*) FROM judgements WHERE rev IS NULL",
}
FAULTS = {
    "slots marked done that no label is in": """
        SELECT count(*) FROM slots WHERE state = 'done'
        AND NOT EXISTS (SELECT 1 FROM judgements WHERE slot_id = slots.id AND rev = 0)""",
    "slots with a label that are not marked done": """
        SELECT count(*) FROM slots WHERE state <> 'done'
        AND EXISTS (SELECT 1 FROM judgements WHERE slot_id = slots.id AND rev IS NOT NULL)""",
    "slots whose revisions have a gap": """
        SELECT count(*) FROM (SELECT slot_id FROM judgements WHERE rev IS NOT NULL
        GROUP BY slot_id HAVING max(rev) + 1 <> count(*)) AS found""",
    "tasks that one person labelled twice": """
        SELECT count(*) FROM (SELECT task_id FROM slots WHERE state = 'done'
        GROUP BY task_id, annotator_id HAVING count(*) > 1) AS found""",
    "labels that are not of whoever holds the slot": """
        SELECT count(*) FROM judgements JOIN slots ON slots.id = slot_id
        WHERE rev IS NOT NULL
        AND (slots.annotator_id IS NULL OR judgements.annotator_id <> slots.annotator_id)""",
    "checks whose answer is not known": """
        SELECT count(*) FROM tasks JOIN rounds ON rounds.id = round_id
        WHERE (purpose = 'check') <> (known IS NOT NULL)""",
    "checks and repeats that are not one person's": """
        SELECT count(*) FROM slots JOIN rounds ON rounds.id = round_id
        WHERE purpose <> 'label' AND (reserved_id IS NULL OR reserved_id <> number)""",
    "repeats of what the same person had not labelled": """
        SELECT count(*) FROM slots JOIN tasks ON tasks.id = task_id JOIN rounds ON rounds.id = slots.round_id
        WHERE purpose = 'repeat' AND NOT EXISTS (
            SELECT 1 FROM tasks AS first JOIN slots AS done ON done.task_id = first.id
            WHERE first.round_id = rounds.part_of AND first.key = tasks.key AND done.state = 'done'
            AND done.annotator_id = slots.number)""",
}
"""What the schema and `annotate.queue` rule out; any of them means that something else wrote there."""


def check(url: str) -> tuple[dict[str, int], list[str]]:
    """(counts of what there is, everything that is wrong). Reads only; people may be working.

    Of a database of an older version the file and its references alone, and no counts.
    Raises DataError where there is none, or none that can be reached.
    """
    counts: dict[str, int] = {}
    faults: list[str] = []
    engine = _existing(url)
    try:
        with engine.connect().execution_options(read=True) as x:
            _ground(x, faults)
            _rows(x, counts, faults)
    except DBAPIError as error:
        if engine.dialect.name != "sqlite":
            raise DataError(f"{printable(url)}: {fault(error)}") from None
        faults.append(f"the file is damaged, or no label database: {error.orig}")
    finally:
        engine.dispose()
    return counts, faults


def _ground(x: Connection, faults: list[str]) -> None:
    if x.dialect.name == "sqlite":
        for row in x.execute(text("PRAGMA integrity_check")):
            if row[0] != "ok":
                faults.append(f"the file is damaged: {row[0]}")
        broken = len(x.execute(text("PRAGMA foreign_key_check")).all())
        if broken:
            faults.append(f"{broken} rows refer to rows that are not there")
    elif not inspect(x).has_table("database"):
        raise DataError(f"{printable(str(x.engine.url))}: no label database there yet")
    elif x.execute(text("SHOW fsync")).scalar() != "on":
        faults.append("the server runs with fsync=off: what it says is saved may not be on its disk")


def _rows(x: Connection, counts: dict[str, int], faults: list[str]) -> None:
    version = x.execute(text("SELECT version FROM database")).scalar()
    if version is not None and version < VERSION:
        return
    for name, query in COUNTS.items():
        counts[name] = int(x.execute(text(query)).scalar_one())
    for name, query in FAULTS.items():
        if found := x.execute(text(query)).scalar_one():
            faults.append(f"{found} {name}")


def backup(url: str, path: Path) -> None:
    """A copy of the database as it is at this moment, complete or not there at all; people may be working.

    Raises DataError where `path` exists, since a copy must not overwrite another, or cannot be written, and
    for PostgreSQL, which makes its own.
    """
    engine = _existing(url)
    engine.dispose()
    if engine.dialect.name != "sqlite":
        raise DataError(
            f"{printable(url)}: PostgreSQL makes its copies itself: pg_dump -Fc -f {path} DATABASE"
        )
    source = str(engine.url.database)
    if path.exists():
        raise DataError(f"{path}: exists already; name another file")
    draft = path.with_name(path.name + ".draft")
    try:
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(draft)) as other:
            one.backup(other)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, sqlite3.Error) as error:
        draft.unlink(missing_ok=True)
        raise DataError(f"{path}: not written ({error})") from None


def _existing(url: str) -> Engine:
    engine = open_engine(url)
    # To open a file that is not there would make it.
    if engine.dialect.name == "sqlite" and not Path(str(engine.url.database)).exists():
        raise DataError(f"{url}: no label database there yet")
    return engine
