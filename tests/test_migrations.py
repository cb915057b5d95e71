"""Label databases of every version are brought to the present one, whole; a new one is made the same."""

import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from annotate.care import check
from annotate.engine import open_engine
from annotate.form import Form
from annotate.migrations import upgrade
from annotate.recording import Label
from annotate.records import DataError
from annotate.schema import VERSION, Base
from annotate.store import Store
from tests.test_store import item

GOLDENS = Path("tests/goldens")
OLD = sorted(int(path.stem.removeprefix("labels-")) for path in GOLDENS.glob("labels-*.sql"))
"""Versions of which there is a file, as the prefloop of the time wrote it: three tasks, two labels."""


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "labels.db") as x:
        x.executescript((GOLDENS / f"labels-{request.param}.sql").read_text())
    return f"sqlite:///{tmp_path}/labels.db"


def query(store: Store, statement: str) -> list[tuple[object, ...]]:
    with store.connection() as x:
        return [tuple(row) for row in x.execute(text(statement))]


def triggers(x: Connection) -> list[str]:
    find = (
        "SELECT sql FROM sqlite_master WHERE type = 'trigger'"
        if x.dialect.name == "sqlite"
        else "SELECT pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid "
        "WHERE NOT tgisinternal AND c.relnamespace = current_schema()::regnamespace"
    )
    found = [re.sub(r"labels\d+\.", "", sql.lower()) for sql in x.execute(text(find)).scalars()]
    return sorted(found)


def constraints(x: Connection) -> dict[str, list[str]]:
    """What Alembic does not compare: conditions, and indexes with theirs."""
    found, see = {}, inspect(x)
    for table in Base.metadata.tables:
        conditions = [" ".join(str(check["sqltext"]).split()) for check in see.get_check_constraints(table)]
        references = [
            f"{key['constrained_columns']} {key['referred_table']} {key['referred_columns']}"
            for key in see.get_foreign_keys(table)
        ]
        indexes = [
            f"{index['name']} {index['column_names']} {index.get('expressions')} {index['unique']} "
            f"{index['dialect_options'].get(f'{x.dialect.name}_where')}"
            for index in see.get_indexes(table)
        ]
        unique = [str(key["column_names"]) for key in see.get_unique_constraints(table)]
        found[table] = sorted(conditions + references + indexes + unique)
    return found


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection")  # the order of priority, on SQLite
def same(x: Connection, y: Connection) -> None:
    """The one database has the schema of the other, and of annotate.schema."""
    context = MigrationContext.configure(x, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, Base.metadata) == []
    assert triggers(x) == triggers(y) != []
    assert constraints(x) == constraints(y)


def test_of_every_version_before_this_there_is_a_file() -> None:
    assert set(OLD) >= set(range(1, VERSION))


def test_revisions_from_nothing_and_a_new_database_are_the_same(fresh: Callable[[], str]) -> None:
    new = Store(fresh())
    engine = open_engine(fresh())
    with engine.begin() as x:
        upgrade(x, None)
    with engine.connect() as x, new.connection() as y:
        same(x, y)
        assert x.execute(text("SELECT version FROM database")).scalar_one() == VERSION
    engine.dispose()
    new.close()


@pytest.mark.parametrize("old", OLD, indirect=True)
def test_an_old_file_keeps_every_label_and_goes_on(old: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "labels.db") as x:
        [[name]] = x.execute("SELECT id FROM database")
    for _ in range(2):  # and opened again as any other
        store = Store(old)
        assert store.id == name
    new = Store(f"sqlite:///{tmp_path}/new.db")
    with store.connection() as x, new.connection() as y:
        same(x, y)
    before = {label.task: label.preference for label in store.labels(1)}
    assert sorted(map(str, before.values())) == ["-3", "None"]
    assert query(store, "SELECT count(*) FROM judgements WHERE NOT both_bad AND guidelines IS NULL") == [(3,)]

    round_id, me = store.open_round("r", [item(n) for n in range(3)]), store.annotator("ann")
    assert round_id == 1 and {past.shown.task for past in store.history(1, me)} == before.keys()
    _, [last] = store.step(1, me, want=3)
    said = Label(
        token=f"{last.key}-0", preference=0, both_bad=True, form=store.form(Form()), reason="none fits"
    )
    assert store.step(1, me, [said])[0] == ["saved"]
    assert {label.task: label.preference for label in store.labels(1)} == before | {last.task: 0}
    assert check(old)[1] == []


def test_a_file_of_the_first_version_with_invitations_is_brought_here_too(tmp_path: Path) -> None:
    """They came before the number of the version did."""
    with sqlite3.connect(tmp_path / "labels.db") as x:
        x.executescript((GOLDENS / "labels-1.sql").read_text())
        x.execute(
            "CREATE TABLE invitations (annotator_id INTEGER NOT NULL, "
            "sha VARCHAR NOT NULL, at DOUBLE NOT NULL, "
            "PRIMARY KEY (annotator_id), UNIQUE (sha), FOREIGN KEY(annotator_id) REFERENCES annotators (id))"
        )
        x.execute("INSERT INTO invitations VALUES (1, 'secret', 0)")
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    assert query(store, "SELECT annotator_id, sha FROM invitations") == [(1, "secret")]
    new = Store(f"sqlite:///{tmp_path}/new.db")
    with store.connection() as x, new.connection() as y:
        same(x, y)


@pytest.mark.parametrize("old", [1], indirect=True)
def test_an_upgrade_that_fails_leaves_the_file_as_it_was(old: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "labels.db") as x:
        x.execute("CREATE TABLE forms (something INTEGER)")  # stands in the way of the last step
        before = list(x.iterdump())
    with pytest.raises(DataError, match="forms already exists"):
        Store(old)
    with sqlite3.connect(tmp_path / "labels.db") as x:
        assert list(x.iterdump()) == before


def test_a_newer_database_is_refused_in_one_line(fresh: Callable[[], str]) -> None:
    newer = Store(fresh())
    with newer.transaction() as x:
        x.execute(text("UPDATE database SET version = 99"))
    newer.close()
    with pytest.raises(DataError, match=f"version 99 of the label database, this prefloop needs {VERSION}$"):
        Store(newer.url)


def test_opening_what_is_up_to_date_loads_no_alembic(fresh: Callable[[], str]) -> None:
    url = fresh()
    for _ in range(2):  # the first makes it
        code = f"import sys\nfrom annotate.store import Store\nStore({url!r})\n"
        done = subprocess.run(
            [sys.executable, "-c", code + "assert 'alembic' not in sys.modules"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
