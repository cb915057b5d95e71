"""Copies of the label database, and the check of it, while others write and after somebody meddled."""

import sqlite3
import threading

import pytest
from sqlalchemy import text

from annotate.care import FAULTS, backup, check
from annotate.recording import Label
from annotate.records import DataError
from annotate.schema import VERSION
from annotate.store import Store
from stages import cli
from tests.test_migrations import GOLDENS, OLD
from tests.test_store import item

ITEMS = [item(n) for n in range(30)]


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    yield store
    store.close()


def work(store, who, count):
    me, round_id = store.annotator(who), store.open_round("r", ITEMS, overlap=2)
    for number in range(count):
        _, [view] = store.step(round_id, me, want=1)
        store.step(round_id, me, [Label(token=f"{view.key}-{number}", preference=1)])


def test_a_sound_database_is_counted(store):
    work(store, "ann", 5)
    counts, faults = check(store.url)
    assert faults == []
    assert counts["tasks"] == 30 and counts["labels that count"] == counts["said in all"] == 5


def test_a_copy_made_while_people_work_is_sound_and_whole(store, tmp_path):
    """Every label acknowledged before the copy began is in it."""
    stop, told = threading.Event(), []

    def person():
        me, round_id = store.annotator("ann"), store.open_round("r", ITEMS)
        number = 0
        while not stop.is_set():
            views = store.step(round_id, me, want=1)[1] or store.history(round_id, me, 1)
            key = getattr(views[0], "key", None) or views[0].shown.key
            store.step(round_id, me, [Label(token=f"{key}-{number}", preference=number % 3)])
            told.append(f"{key}-{number}")
            number += 1

    thread = threading.Thread(target=person)
    thread.start()
    try:
        for n in range(5):
            while len(told) < 20 * (n + 1):
                stop.wait(0.01)
            before = set(told)
            backup(store.url, tmp_path / f"copy{n}.db")
            with sqlite3.connect(tmp_path / f"copy{n}.db") as x:
                assert before <= {token for (token,) in x.execute("select token from judgements")}
            assert check(f"sqlite:///{tmp_path}/copy{n}.db")[1] == []
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("version", [version for version in OLD if version < VERSION])
def test_a_database_of_an_older_version_is_sound_is_copied_and_stays_what_it_is(version, tmp_path, capsys):
    with sqlite3.connect(tmp_path / "old.db") as x:
        x.executescript((GOLDENS / f"labels-{version}.sql").read_text())
    said = "of an older version, until it is opened: checked as a file alone\nsound\n"
    db = f"collect.db=sqlite:///{tmp_path}/old.db"
    for option in (["--check"], ["--backup", str(tmp_path / "copy.db")]):
        assert cli.main(["annotate", "configs/smoke.yaml", db, *option]) == 0
        assert capsys.readouterr().out.endswith(said)
    Store(f"sqlite:///{tmp_path}/copy.db").close()
    counts, faults = check(f"sqlite:///{tmp_path}/copy.db")
    assert faults == [] and counts["labels that count"] == 2
    assert check(f"sqlite:///{tmp_path}/old.db")[0].keys() != counts.keys()


def test_an_older_version_is_told_on_either_database(fresh):
    store = Store(fresh())
    with store.transaction() as x:
        x.execute(text("update database set version = 1"))
    counts, faults = check(store.url)
    assert counts == {} and faults == []
    store.close()


MEDDLING = {
    "slots marked done that no label is in": (
        "update slots set state = 'done', annotator_id = (select id from annotators) "
        "where id = (select max(id) from slots)"
    ),
    "labels that are not of whoever holds the slot": (
        "drop trigger slots_stay; insert into annotators (name, kind) values ('eve', 'person');"
        "update slots set annotator_id = (select id from annotators where name = 'eve') where state = 'done'"
    ),
    "slots with a label that are not marked done": (
        "drop trigger slots_stay; update slots set state = 'open', lease_until = 0 where state = 'done'"
    ),
    "slots whose revisions have a gap": (
        "drop trigger judgements_no_update; update judgements set rev = 1 where id = 1"
    ),
}


@pytest.mark.parametrize("fault", MEDDLING)
def test_meddling_is_found(store, tmp_path, fault):
    assert fault in FAULTS
    work(store, "ann", 3)
    with sqlite3.connect(tmp_path / "labels.db") as x:
        x.executescript(MEDDLING[fault])
    assert any(fault in found for found in check(store.url)[1])


def test_a_damaged_file_is_said_to_be(store, tmp_path):
    work(store, "ann", 20)
    store.close()
    path = tmp_path / "labels.db"
    with sqlite3.connect(path) as x:
        x.execute("pragma wal_checkpoint(truncate)")
        x.execute("pragma writable_schema = on")
        x.execute("delete from sqlite_master where name = 'slots_mine'")
    assert any("damaged" in found for found in check(store.url)[1])


@pytest.mark.parametrize("content", ["no database at all, " * 100, ""])
def test_a_file_that_is_no_label_database_is_one_line(tmp_path, capsys, content):
    (tmp_path / "other.db").write_text(content)
    db = f"collect.db=sqlite:///{tmp_path}/other.db"
    assert cli.main(["annotate", "configs/smoke.yaml", db, "--check"]) == 1
    said = capsys.readouterr().out
    assert "wrong: the file is damaged, or no label database" in said and "Traceback" not in said


def test_copies_overwrite_nothing_and_say_what_is_wrong(store, tmp_path):
    path = tmp_path / "copy.db"
    backup(store.url, path)
    with pytest.raises(DataError, match="exists already"):
        backup(store.url, path)
    with pytest.raises(DataError, match="not written"):
        backup(store.url, tmp_path / "no" / "copy.db")
    for ask in (check, lambda url: backup(url, tmp_path / "other.db")):
        with pytest.raises(DataError, match="no label database there yet"):
            ask(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_the_command_checks_and_copies(store, tmp_path, capsys):
    work(store, "ann", 3)
    db = f"collect.db={store.url}"
    assert cli.main(["annotate", "configs/smoke.yaml", db, "--check"]) == 0
    assert "3 labels that count" in capsys.readouterr().out
    assert cli.main(["annotate", "configs/smoke.yaml", db, "--backup", str(tmp_path / "copy.db")]) == 0
    assert capsys.readouterr().out.endswith("sound\n") and (tmp_path / "copy.db").exists()
    with sqlite3.connect(tmp_path / "labels.db") as x:
        x.executescript(MEDDLING["slots marked done that no label is in"])
    assert cli.main(["annotate", "configs/smoke.yaml", db, "--check"]) == 1
    assert "wrong: 1 slots marked done" in capsys.readouterr().out
