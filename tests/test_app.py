"""The labelling page's server over real HTTP: what it answers and refuses, and that kill -9 loses nothing."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from annotate.care import check
from annotate.form import Answers
from annotate.gate import cookie_name
from annotate.records import Item, Message, prompt_id
from annotate.store import Store

if TYPE_CHECKING:
    from tests.postgres import Postgres

SERVER = """
import sys
from annotate.app import serve
from annotate.store import Store
store = Store(sys.argv[1])
serve(store, 1, "a round", sys.argv[2] or None, port=0)
"""
POLICY = "the-secret-policy"


def item(number: int) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"one {number}", f"two {number}"], policies=[POLICY, POLICY])


@dataclass
class Server:
    """The real page in a process of its own."""

    url: str
    name: str = ""
    process: subprocess.Popen[str] | None = None
    port: int = 0

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, self.url, self.name]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        assert found is not None
        self.port = int(found[1])

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=20)
            assert self.process.stdout is not None
            self.process.stdout.close()


class Browser:
    """What a browser sends, without one."""

    def __init__(self, server: Server, name: str | None = "ann"):
        self.server, self.cookie, self.component = server, "", 0
        if name is not None:
            body = f"name={name}"
            status, headers, _ = self.request("POST", "/enter", body, "application/x-www-form-urlencoded")
            assert (status, headers["location"]) == (303, "/label/")
            self.cookie = headers["set-cookie"].split(";")[0]
            config = json.loads(self.request("GET", "/label/config")[2])
            [self.component] = [c["id"] for c in config["components"] if c["type"] == "html"]

    def request(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", **extra: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        headers = {"content-type": kind} if body is not None else {}
        headers |= {"cookie": self.cookie} if self.cookie else {}
        connection.request(method, path, body, headers | {k.replace("_", "-"): v for k, v in extra.items()})
        answer = connection.getresponse()
        found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def call(self, function: str, argument: object) -> tuple[int, Any]:
        call = {"data": argument, "component_id": self.component, "fn_name": function, "session_hash": "x"}
        status, _, body = self.request("POST", "/label/gradio_api/component_server/", json.dumps(call))
        return status, json.loads(body) if status == 200 else body

    def step(self, *labels: object, want: int = 0, count: bool = False) -> Any:
        status, answer = self.call("step", {"labels": list(labels), "want": want, "count": count})
        assert status == 200
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(f"sqlite:///{tmp_path_factory.mktemp('app')}/labels.db")
    Store(server.url).open_round("r", [item(n) for n in range(200)])
    server.start()
    yield server
    server.kill()


def test_a_label_goes_in_and_comes_back_as_history(server: Server) -> None:
    ann = Browser(server, "historian")
    _, hello = ann.call("hello", {})
    assert (hello["name"], hello["title"], hello["history"]) == ("historian", "a round", [])
    before = hello["progress"]["done"]
    answer = ann.step(want=2)
    assert answer["ok"] and answer["statuses"] == [] and "progress" not in answer
    first, second = answer["tasks"]
    assert first.keys() == {"key", "messages", "completions"}

    label = {"token": first["key"] + "-a", "preference": -2, "reason": None, "client_ms": 900}
    answer = ann.step(label, want=2, count=True)
    assert answer["statuses"] == ["saved"] and answer["progress"]["done"] == before + 1
    assert answer["tasks"][0] == second and first not in answer["tasks"]
    assert ann.step(label)["statuses"] == ["duplicate"]
    said = {"preference": -2, "both_bad": False, "answers": Answers().model_dump()}
    assert ann.call("hello", {})[1]["history"] == [first | said]


def test_nothing_the_browser_gets_names_a_policy(server: Server) -> None:
    ann = Browser(server, "curious")
    for path in ("/label/", "/label/config"):
        assert POLICY.encode() not in ann.request("GET", path)[2]
    assert POLICY not in json.dumps(ann.step(want=10)) + json.dumps(ann.call("hello", {}))


def test_markdown_is_rendered_safely_and_only_for_who_holds_the_task(server: Server) -> None:
    ann, bob = Browser(server, "reader"), Browser(server, "peeper")
    [task] = ann.step(want=1)["tasks"]
    html = [f"<p>{text}</p>\n" for text in task["completions"]]
    assert ann.call("markdown", {"keys": [task["key"]]})[1]["html"][task["key"]]["completions"] == html
    assert bob.call("markdown", {"keys": [task["key"]]})[1] == {"ok": True, "html": {}}
    for bad in (
        None,
        {},
        {"keys": "1-1"},
        {"keys": ["1"]},
        {"keys": ["1-1"] * 11},
        {"keys": [], "texts": ["x"]},
    ):
        assert ann.call("markdown", bad)[1]["error"].startswith("not rendered")


def test_another_persons_task_is_refused_and_stays_theirs(server: Server) -> None:
    ann, bob = Browser(server, "owner"), Browser(server, "thief")
    [task] = ann.step(want=1)["tasks"]
    label = {"token": task["key"] + "-a", "preference": 1}
    assert bob.step(label)["statuses"] == ["refused"]
    assert ann.step(label)["statuses"] == ["saved"]


@pytest.mark.parametrize(
    "argument",
    [
        None,
        [],
        "text",
        {"labels": [], "want": 11},
        {"labels": [], "want": -1},
        {"labels": [], "want": 1, "annotator": 1},
        {"labels": [{"token": "1-1-a", "preference": 4}], "want": 1},
        {"labels": [{"token": "1-1-a", "preference": "1"}], "want": 1},
        {"labels": [{"token": "1-1-a", "preference": 0.5}], "want": 1},
        {"labels": [{"token": "1-1-a"}], "want": 1},
        {"labels": [{"token": "x", "preference": 1}], "want": 1},
        {"labels": [{"token": "1-1-a", "preference": None, "reason": "x" * 3000}], "want": 1},
        {"labels": [{"token": "1-1-a", "preference": 1}] * 51, "want": 1},
    ],
)
def test_a_step_out_of_form_is_refused_whole_and_says_why(server: Server, argument: object) -> None:
    status, answer = Browser(server).call("step", argument)
    assert status == 200
    assert answer.keys() == {"error"} and answer["error"].startswith("not saved")


def test_unknown_slots_are_refused(server: Server) -> None:
    answer = Browser(server).step(
        {"token": "99999-1-a", "preference": 1}, {"token": "1-999999-a", "preference": 1}
    )
    assert answer["statuses"] == ["refused", "refused"]


def test_without_a_session_there_is_only_the_entry(server: Server) -> None:
    nobody = Browser(server, None)
    assert nobody.request("GET", "/")[1]["location"] == "/enter"
    assert nobody.request("GET", "/label/")[1]["location"] == "/enter"
    assert nobody.request("GET", "/enter")[0] == 200
    assert nobody.request("GET", "/whoami")[0] == 401
    assert nobody.request("GET", "/label/config")[0] == 401
    assert nobody.call("hello", {})[0] == 401
    nobody.cookie = f"{cookie_name(Store(server.url))}=guess"
    assert nobody.call("hello", {})[0] == 401


def test_names_are_checked_and_shown_as_text(server: Server) -> None:
    nobody = Browser(server, None)
    form = "application/x-www-form-urlencoded"
    assert nobody.request("POST", "/enter", "name=", form)[0] == 422
    status, _, body = nobody.request("POST", "/enter", "name=" + "%3Cb%3E" * 30, form)
    assert status == 422 and b"&lt;b&gt;" in body and b"<b>" not in body


def test_the_same_name_is_the_same_annotator(server: Server) -> None:
    [task] = Browser(server, "twice").step(want=1)["tasks"]
    assert Browser(server, "twice").step(want=1)["tasks"] == [task]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/label/gradio_api/upload"),
        ("POST", "/label/gradio_api/queue/join"),
        ("GET", "/label/gradio_api/queue/data?session_hash=x"),
        ("POST", "/label/gradio_api/run/step"),
        ("POST", "/label/gradio_api/call/step"),
        ("GET", "/label/gradio_api/info"),
        ("GET", "/label/gradio_api/file=/etc/passwd"),
        ("GET", "/label/gradio_api/file=http://example.com/"),
        ("GET", "/label/gradio_api/proxy=https://example.com/"),
        ("GET", "/label/gradio_api/heartbeat/x"),
        ("POST", "/label/gradio_api/cancel"),
        ("GET", "/label/gradio_api/runs"),
        ("GET", "/label/monitoring"),
        ("GET", "/label/gradio_api/app_id"),
        ("GET", "/label/assets/../config"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("PUT", "/enter"),
        ("DELETE", "/label/"),
    ],
)
def test_everything_else_that_gradio_serves_is_closed(server: Server, method: str, path: str) -> None:
    ann = Browser(server)
    body = "{}" if method == "POST" else None
    assert ann.request(method, path, body)[0] == 404


def test_calls_that_the_page_never_makes_are_refused(server: Server) -> None:
    ann = Browser(server)
    path = "/label/gradio_api/component_server/"
    good = {"data": {}, "component_id": ann.component, "fn_name": "hello", "session_hash": "x"}
    assert ann.request("POST", path, json.dumps(good))[0] == 200
    for change in (
        {"fn_name": "postprocess"},
        {"component_id": 999},
        {"component_id": "1"},
        {"session_hash": 1},
    ):
        assert ann.request("POST", path, json.dumps(good | change))[0] == 400
    for body in ("", "{", "[]", "null", "\xff", json.dumps(good | {"more": 1})):
        assert ann.request("POST", path, body.encode("latin-1"))[0] == 400
    assert ann.request("POST", path, json.dumps(good), "text/plain")[0] == 415
    assert ann.request("POST", path, json.dumps(good), "multipart/form-data; boundary=x")[0] == 415
    assert ann.request("POST", path, "x" * 300_000)[0] == 413


def test_other_sites_and_names_are_refused(server: Server) -> None:
    ann = Browser(server)
    assert ann.request("GET", "/label/", host="evil.example")[0] == 421
    assert ann.request("GET", "/label/", host=f"localhost:{server.port}")[0] == 200
    assert ann.request("GET", "/label/config", origin="http://evil.example")[0] == 403
    assert ann.request("GET", "/label/config", origin="null")[0] == 403
    assert (
        ann.request(
            "POST", "/enter", "name=x", "application/x-www-form-urlencoded", origin="http://127.0.0.1:1"
        )[0]
        == 403
    )
    _, headers, _ = ann.request("GET", "/label/")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_given_name_is_taken_unasked_and_sessions_survive_a_restart(tmp_path: Path) -> None:
    server = Server(f"sqlite:///{tmp_path}/labels.db", name="given")
    Store(server.url).open_round("r", [item(0)])
    server.start()
    nobody = Browser(server, None)
    status, headers, _ = nobody.request("GET", "/")
    assert (status, headers["location"]) == (303, "/label/")
    assert "HttpOnly" in headers["set-cookie"] and "samesite=strict" in headers["set-cookie"].lower()
    nobody.cookie = headers["set-cookie"].split(";")[0]
    server.kill(signal.SIGTERM)
    server.start()
    assert json.loads(nobody.request("GET", "/whoami")[2]) == {"name": "given"}
    server.kill()


def test_a_taken_port_and_a_bad_name_say_so(server: Server, tmp_path: Path) -> None:
    from annotate.app import serve
    from annotate.records import DataError

    store = Store(f"sqlite:///{tmp_path}/labels.db")
    with pytest.raises(DataError, match="choose another"):
        serve(store, 1, "r", port=server.port)
    with pytest.raises(DataError, match="printable"):
        serve(store, 1, "r", name="\n", port=0)


def label_until(stop: threading.Event, server: Server, who: str, acknowledged: list[str]) -> None:
    """Label without a pause until told to stop, or until a server is gone; keeps what was acknowledged."""
    try:
        browser = Browser(server, who)
        tasks = browser.step(want=3)["tasks"]
        while not stop.is_set():
            token = tasks[0]["key"] + "-" + os.urandom(4).hex()
            answer = browser.step({"token": token, "preference": 1}, want=3)
            if answer.get("statuses") == ["saved"]:
                acknowledged.append(token)
            tasks = answer["tasks"]
    except (OSError, http.client.HTTPException):
        return  # the server was killed in the middle
    except KeyError:
        assert "can it be reached" in answer["error"]  # that of the database was


def kill_under_load(
    url: str, kills: int, people: int, seconds: float, postgres: "Postgres | None" = None
) -> int:
    """Kills the server so often while people label; how many labels were acknowledged, all of them found.

    With `postgres`, the server of the database is killed first, and started again.
    """
    store = Store(url)
    store.open_round("r", [item(n) for n in range(1000 * kills)])
    acknowledged: list[str] = []
    for _ in range(kills):
        server, stop = Server(url), threading.Event()
        server.start()
        work = [(stop, server, f"p{n}", acknowledged) for n in range(people)]
        threads = [threading.Thread(target=label_until, args=arguments) for arguments in work]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        if postgres is not None:
            postgres.kill()
            time.sleep(0.2)  # while the page is still there
        server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        if postgres is not None:
            postgres.start()

    with store.connection() as x:
        stored = set(x.execute(text("select token from judgements")).scalars())
    store.close()
    assert check(url)[1] == []
    assert len(acknowledged) > 20 * kills
    assert set(acknowledged) <= stored
    return len(acknowledged)


def test_kill_9_loses_no_acknowledged_label(tmp_path: Path) -> None:
    kill_under_load(f"sqlite:///{tmp_path}/labels.db", kills=5, people=4, seconds=1.0)


@pytest.mark.soak
def test_a_hundred_kills_lose_no_acknowledged_label(tmp_path: Path) -> None:
    kill_under_load(f"sqlite:///{tmp_path}/labels.db", kills=100, people=8, seconds=1.5)
