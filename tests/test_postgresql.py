"""Labels in PostgreSQL: two servers of the page on one database, kills of both, and bad addresses."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from annotate.app import application
from annotate.calls import Calls
from annotate.care import check
from annotate.engine import open_engine
from annotate.form import Form
from annotate.gate import UNREACHABLE, Gate, cookie_name
from annotate.ledger import Ledger
from annotate.recording import Label
from annotate.records import DataError, Item
from annotate.researcher import Recent
from annotate.statements import FREE
from annotate.store import Store, Who
from stages import cli
from tests.test_app import Browser, Server, item, kill_under_load

if TYPE_CHECKING:
    from tests.postgres import Postgres

PEOPLE = 4


def work(servers: list[Server], who: int) -> list[tuple[str, str]]:
    """One annotator with a page open on each server, who double-clicks on both, reloads and loses leases."""
    dice, told = random.Random(who), []
    pages = [Browser(server, f"p{who}") for server in servers]
    with ThreadPoolExecutor(2) as hands:
        while tasks := dice.choice(pages).step(want=2)["tasks"]:
            if dice.random() < 0.2:
                time.sleep(0.3)  # longer than the lease
            label = {"token": f"{tasks[0]['key']}-{who}", "preference": dice.randint(-3, 3)}
            clicked = pages if dice.random() < 0.5 else [dice.choice(pages)]
            answers = hands.map(lambda page, label=label: page.step(label, want=2), clicked)  # type: ignore[misc]
            told += [(label["token"], answer["statuses"][0]) for answer in answers]
    return told


def test_two_servers_on_one_database_lose_and_double_nothing(postgres: "Postgres") -> None:
    url, overlap, tasks = postgres.database(), 3, 15
    store = Store(url)
    round_id = store.open_round("r", [item(n) for n in range(tasks)], overlap=overlap, lease=0.25)
    servers = [Server(url), Server(url)]
    with ThreadPoolExecutor(PEOPLE) as pool:
        list(pool.map(Server.start, servers))
        told = [
            entry for person in pool.map(lambda who: work(servers, who), range(PEOPLE)) for entry in person
        ]
    for server in servers:
        server.kill()
    saved = Counter(token for token, status in told if status == "saved")
    assert set(saved.values()) == {1} and {status for _, status in told} <= {"saved", "duplicate", "late"}
    found = store.labels(round_id)
    assert len(saved) == len(found) == overlap * tasks
    assert Counter(Counter(label.task for label in found).values()) == {overlap: tasks}
    assert len({(label.task, label.annotator) for label in found}) == overlap * tasks
    assert check(url)[1] == []
    store.close()


def test_a_slot_that_another_held_for_a_moment_is_found_again_from_the_head(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    round_id, ann = store.open_round("r", [item(n) for n in range(3)]), store.annotator("ann")
    with store.connection() as x:  # a step that takes the first slot, and fails
        x.execute(text("select id from slots order by priority desc limit 1 for update"))
        _, [second] = store.step(round_id, ann, want=1)
    tasks = [second.task]
    while views := store.step(round_id, ann, [Label(token=f"{second.key}-a", preference=1)], want=1)[1]:
        [second] = views
        tasks.append(second.task)
    assert len(set(tasks)) == len(tasks) == 3 and store.progress(round_id).done == 3
    store.close()


def test_the_next_slot_is_found_in_order_whatever_statistics_there_are(postgres: "Postgres") -> None:
    """With those of a round half done it would rather join all free slots with one's own, and sort."""
    store = Store(postgres.database())
    store.open_round("r", [], overlap=20)
    with store.transaction() as x:
        for fill in FILL:
            x.execute(text(fill))
    with store._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as x:
        x.execute(text("vacuum analyze"))
    asked = {"round": 1, "now": 0.0, "but": []}
    for me in (1, 10, 20):
        for n, priority in ((1, 2.0), (1, 0.04), (4, 0.01)):
            query = FREE.params(asked | {"me": me, "n": n, "priority": priority, "slot": 1})
            with store.connection() as x:
                compiled = query.compile(x, compile_kwargs={"literal_binds": True})
                plan = "\n".join(x.exec_driver_sql(f"explain {compiled}").scalars())
            assert "Index Scan using slots_free" in plan and "Sort" not in plan, plan
            assert "Anti Join" not in plan, plan  # whose size it may take for nothing, and then sort it
    store.close()


FILL = (
    "insert into prompts select 'p' || v, '[]' from generate_series(1, 4000) v",
    "insert into tasks (id, round_id, key, prompt_id, response_ids, policies) "
    "select v, 1, 'k' || v, 'p' || v, '[]', '[]' from generate_series(1, 4000) v",
    "insert into annotators (name, kind, role) select v, 'person', 'annotator' from generate_series(1, 20) v",
    "insert into slots (task_id, round_id, number, priority, active, state, lease, annotator_id) "
    "select t, 1, n, 1 - t / 4001.0, true, case when done then 'done' else 'free' end, 0, "
    "case when done then n + 1 end from (select t, n, t < 3800 + 9 * n as done "
    "from generate_series(1, 4000) t, generate_series(0, 19) n) as each",
)


def test_batches_that_name_one_anothers_slots_wait_in_no_circle(postgres: "Postgres") -> None:
    """Everyone keeps labelling, in one batch and in any order, what all have been shown and lost again."""
    store = Store(postgres.database())
    round_id = store.open_round("r", [item(n) for n in range(12)], lease=0.0)
    people = [store.annotator(f"p{n}") for n in range(6)]
    keys = [(who, view.key) for who in people for view in store.step(round_id, who, want=12)[1]]

    def batches(who: int) -> Counter[str]:
        dice, said = random.Random(who), Counter[str]()
        mine = [key for owner, key in keys if owner == who]
        for turn in range(15):
            labels = [Label(token=f"{key}-{turn}", preference=1) for key in dice.sample(mine, len(mine))]
            statuses, shown = store.step(round_id, who, labels, want=4)
            said.update(statuses)
            mine = list({*mine, *(view.key for view in shown)})
        return said

    with ThreadPoolExecutor(6) as pool:
        told = sum(pool.map(batches, people), Counter[str]())
    assert told["late"] > 0 and not told["refused"]
    for who in people:  # nothing of it keeps a task from being done
        while shown := store.step(round_id, who, want=1)[1]:
            last = Label(token=f"{shown[0].key}-last", preference=1)
            assert store.step(round_id, who, [last])[0] == ["saved"]
    assert len(store.labels(round_id)) == 12
    assert check(store.url)[1] == []
    store.close()


def test_many_open_one_database_and_its_round_at_once(postgres: "Postgres") -> None:
    url, items = postgres.database(), [item(n) for n in range(20)]

    def begin(_: int) -> tuple[str, int, int]:
        store = Store(url)
        round_id, me = store.open_round("r", items, overlap=2), store.annotator("ann")
        shown = store.step(round_id, me, want=3)[1]
        store.close()
        return store.id, round_id, len(shown)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(begin, range(8)))) == 1
    assert check(url) == (check(url)[0], []) and check(url)[0]["tasks"] == 20


def test_texts_are_kept_to_the_byte_and_words_with_nul_refused(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    texts = ["a\0b\x01\x7f\x85z", "\U0001f469\u200d\u2764 \\u0000 \\ud800 \"'"]
    hostile = Item(**item(0).model_dump(exclude={"completions"}), completions=texts)
    round_id, me = store.open_round("r", [hostile]), store.annotator("ann")
    _, [shown] = store.step(round_id, me, want=1)
    assert sorted(shown.completions) == sorted(texts) and shown.task == hostile.task
    store.open_round("r", [hostile])
    assert check(store.url)[0]["tasks"] == 1
    assert store.guidelines("be\0kind") == store.guidelines("be\0kind")
    store.close()


def test_a_word_with_nul_is_refused_with_the_reason(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    form = Form(rationale="optional")
    calls = Calls(store, store.open_round("r", [item(0)]), "r", "none", form)
    who = store.annotator("ann"), "ann"
    for words in ({"reason": "a\0b"}, {"answers": {"rationale": "a\0b"}}):
        answer = calls.step({"labels": [{"token": "1-1-0", "preference": 1, **words}], "want": 0}, who)
        assert re.search("(reason|rationale).*holds a NUL character; take it out", answer["error"])
    store.close()


def test_numbers_beyond_every_slot_are_refused_not_faults(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    round_id, me = store.open_round("r", [item(0)]), store.annotator("ann")
    _, [view] = store.step(round_id, me, want=1)
    far = Label(token="999999999999999-999999999-0", preference=1)
    slow = Label(token=f"{view.key}-0", preference=1, client_ms=10**10)
    assert store.step(round_id, me, [far, slow])[0] == ["refused", "saved"]
    assert store.held(round_id, me, ["999999999999999-1"]) == []
    store.close()


def test_the_disk_is_waited_for_whatever_the_server_has_as_default(postgres: "Postgres") -> None:
    url = postgres.database()
    for default, found in (("off", "on"), ("remote_apply", "remote_apply")):
        engine = open_engine(url.replace("options=", f"options=-csynchronous_commit%3D{default}%20"))
        with engine.connect() as x:
            assert x.execute(text("SHOW synchronous_commit")).scalar() == found
        engine.dispose()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/labels", "onnection refused"),
        ("postgresql://ann:secret@127.0.0.1/labels", "write sqlite:///path/to/labels.db or postgresql"),
        ("mysql://ann:sec@ret@127.0.0.1/labels", "write sqlite:///path/to/labels.db or postgresql"),
        ("postgresql+psycopg:ann:secret@127.0.0.1:1/labels", "not a database URL"),
        ("postgresql+psycopg://ann:secret@127.0.0.1:port/labels", "not a database URL"),
    ],
)
def test_urls_that_lead_nowhere_are_one_line_without_the_password(url: str, said: str) -> None:
    for ask in (Store, check):
        with pytest.raises(DataError, match=said) as error:
            ask(url)
        assert "secret" not in str(error.value) and "ret@" not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_password_is_not_for_the_settings(fails: Any) -> None:
    said = fails("annotate", "configs/smoke.yaml", "collect.db=postgresql+psycopg://a:secret@h/d", code=2)
    assert "secret" not in said and "~/.pgpass" in said


def test_without_the_package_one_line_says_what_to_install() -> None:
    code = """
import sys
sys.modules["psycopg"] = None
from annotate.records import DataError
from annotate.store import Store
try:
    Store("postgresql+psycopg://ann:secret@h/d")
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "postgresql+psycopg://ann:***@h/d: PostgreSQL needs the package psycopg: "
        "pip install 'prefloop[postgresql]'\n"
    )


def test_the_command_checks_and_leaves_copies_to_pg_dump(
    postgres: "Postgres", tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Any
) -> None:
    url = postgres.database()
    said = fails("annotate", "configs/smoke.yaml", f"collect.db={url}", "--check")
    assert "no label database there yet" in said
    store = Store(url)
    round_id, me = store.open_round("r", [item(n) for n in range(3)]), store.annotator("ann")
    _, views = store.step(round_id, me, want=2)
    store.step(round_id, me, [Label(token=f"{view.key}-0", preference=1) for view in views])
    assert cli.main(["annotate", "configs/smoke.yaml", f"collect.db={url}", "--check"]) == 0
    assert "2 labels that count" in capsys.readouterr().out
    said = fails("annotate", "configs/smoke.yaml", f"collect.db={url}", "--backup", tmp_path / "copy.db")
    assert "pg_dump" in said
    with store.transaction() as x:
        x.execute(text("ALTER TABLE slots DISABLE TRIGGER slots_stay"))
        x.execute(text("UPDATE slots SET state = 'open' WHERE state = 'done'"))
    assert cli.main(["annotate", "configs/smoke.yaml", f"collect.db={url}", "--check"]) == 1
    assert "wrong: 2 slots with a label that are not marked done" in capsys.readouterr().out
    store.close()


def test_simulated_annotators_write_the_same_judgements(
    postgres: "Postgres", smoke_runs: Path, tmp_path: Path
) -> None:
    """`prefloop run` with its labels in PostgreSQL ends in the bytes that SQLite led to."""
    [before] = smoke_runs.glob("smoke/collect/*/judgements.jsonl")
    [items] = smoke_runs.glob("smoke/sample/*/items.jsonl")
    command = [sys.executable, "-m", "stages.cli", "collect", "configs/smoke.yaml"]
    command += [f"collect.items={items}", f"collect.db={postgres.database()}"]
    environment = os.environ | {"PREFLOOP_RUNS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [after] = tmp_path.glob("smoke/collect/*/judgements.jsonl")
    assert after.read_bytes() == before.read_bytes()


def test_kill_9_of_both_servers_loses_no_acknowledged_label(postgres: "Postgres") -> None:
    kill_under_load(postgres.database(), kills=1, people=4, seconds=1.5, postgres=postgres)


@pytest.mark.soak
def test_twenty_kills_of_both_servers_lose_no_acknowledged_label(postgres: "Postgres") -> None:
    kill_under_load(postgres.database(), kills=20, people=8, seconds=1.5, postgres=postgres)


def test_while_the_server_is_away_the_page_says_so(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    calls = Calls(store, store.open_round("r", [item(0)]), "r", "none", Form())
    gate, who = Gate(FastAPI(), store, 1, set()), Who(store.annotator("ann"), "ann", "annotator")
    cookie = {"cookie": f"{cookie_name(store)}=any"}
    postgres.kill()
    for answer in (calls.hello({}, who), calls.step({"labels": [], "want": 1}, who)):
        assert answer.keys() == {"error"} and "can it be reached" in answer["error"]
    assert TestClient(gate, "http://127.0.0.1").get("/whoami", headers=cookie).status_code == 503
    postgres.start()
    assert calls.hello({}, who)["ok"]
    store.close()


def test_while_the_server_is_away_the_researchers_pages_say_so_in_one_line(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    round_id, me = store.open_round("r", [item(0)]), store.annotator("ann")
    [view] = store.step(round_id, me, want=1)[1]
    store.step(round_id, me, [Label(token=f"{view.key}-0", preference=1)])
    browser = TestClient(application(store, round_id, "r", name="ann"), "http://127.0.0.1")
    assert browser.get("/round").status_code == 200
    browser.cookies.clear()
    postgres.kill()
    try:
        asked = [browser.get(path) for path in ("/", "/round/disagreements", f"/round/annotator/{me}")]
        asked += [browser.get("/round"), browser.post("/round/state", data={"state": "paused"})]
        assert {(answer.status_code, answer.text) for answer in asked} == {(503, UNREACHABLE)}
        recent = Recent(Ledger(store, round_id))
        recent.begin()  # without a traceback
    finally:
        postgres.start()
    assert recent.overview().asked == 1
    store.close()


def test_a_server_that_comes_back_is_found_again(postgres: "Postgres") -> None:
    store = Store(postgres.database())
    round_id, me = store.open_round("r", [item(n) for n in range(5)]), store.annotator("ann")
    _, views = store.step(round_id, me, want=2)
    postgres.kill()
    with pytest.raises(DataError, match="can it be reached"):
        store.step(round_id, me, [Label(token=f"{views[0].key}-0", preference=1)])
    with pytest.raises(DataError, match="can it be reached"):
        store.progress(round_id)
    postgres.start()
    assert store.step(round_id, me, [Label(token=f"{views[0].key}-0", preference=1)])[0] == ["saved"]
    store.close()
