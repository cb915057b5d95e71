# ruff: noqa: E501 -- a page of results and its long lines
"""How fast the labelling page is, and what it is compared with; writes results/benchmarks/annotate.md.

    python -m tests.benchmarks.annotate            # seven minutes on two quiet cores
    python -m tests.benchmarks.annotate --quick    # one minute, for a look; writes nothing

Servers are processes of their own with a fresh database each. Clients share the machine with them.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from annotate.gate import cookie_name
from annotate.recording import Label
from annotate.store import Store
from tests import postgres
from tests.desk import Desk, Served, chromium
from tests.test_app import item, kill_under_load

PAGE = Path("results/benchmarks/annotate.md")
WANT = 4
"""Pairs that the page holds, and so what every side hands out."""
Argument = dict[str, Any]


@dataclass(frozen=True)
class Size:
    keys: int = 100
    people: int = 50
    labels: int = 40
    queued: int = 8  # labels of each person through Gradio's queue, which is slow
    turns: int = 3
    pace: float = 60.0  # seconds
    tasks: int = 1_000_000
    ahead: int = 20_000
    kills: int = 10


QUICK = Size(keys=30, people=20, labels=10, queued=3, turns=1, pace=8, tasks=50_000, ahead=500, kills=1)


def p(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# --- the page in a browser ------------------------------------------------------------------------------------

PRESS = """() => new Promise((done) => {
  const stage = document.querySelector('.stage'), before = stage.dataset.task, start = performance.now();
  document.body.dispatchEvent(new KeyboardEvent('keydown', { key: '4', bubbles: true }));
  void stage.offsetHeight;  // layout included
  const laid = stage.dataset.task === before ? null : performance.now() - start;
  requestAnimationFrame(() => requestAnimationFrame(() => done([laid, performance.now() - start])));
})"""


def keys(count: int, latency: int) -> tuple[list[float], list[float], float, int]:
    """Milliseconds from key to the next pair laid out, and to the frame after it; ms and requests of a cold load.

    `latency` is added to every answer of the network by Chromium itself.
    """
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        served = Served(Path(folder), [item(n) for n in range(count + 10)])
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        start = time.perf_counter()
        desk = Desk(context, served, "ann")
        load = (time.perf_counter() - start) * 1000
        requests = len([url for url in desk.requests if not url.startswith("data:")])
        conditions = {"offline": False, "latency": latency, "downloadThroughput": -1, "uploadThroughput": -1}
        session = context.new_cdp_session(desk.page)
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", conditions)
        laid, painted = [], []
        for _ in range(count):
            desk.page.wait_for_timeout(300)
            one, two = desk.page.evaluate(PRESS)
            assert one is not None, "the next pair was not there yet"
            laid.append(one)
            painted.append(two)
        desk.sent()
        assert len(served.labels("ann")) == count
        served.kill()
    return laid, painted, load, requests


# --- the server under many people -----------------------------------------------------------------------------


def serve_side(side: str, url: str) -> None:
    """One of: ours; plain, a FastAPI endpoint with the same checks and database work; queue, a Gradio event."""
    store = Store(url)
    if side == "ours":
        from annotate.app import serve

        return serve(store, 1, "benchmark", port=0)
    import socket

    import uvicorn
    from fastapi import Body, FastAPI, Header

    from annotate.calls import Calls
    from annotate.form import Form

    calls, app = Calls(store, 1, "benchmark", "none", Form()), FastAPI()
    if side == "plain":

        @app.post("/step")
        def step(argument: Annotated[Argument, Body()], me: Annotated[int, Header()]) -> Argument:
            return calls.step(argument, (me, ""))
    else:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")  # nothing else but defaults
        import gradio as gr

        with gr.Blocks() as blocks:
            asked, answer = gr.JSON(), gr.JSON()
            gr.Button().click(lambda both: calls.step(both["step"], (both["me"], "")), asked, answer)
        app = gr.mount_gradio_app(app, blocks, "/")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(200)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


@contextmanager
def side(name: str, tasks: int, url: str | None = None) -> Any:
    """(store, port) of a side in a process of its own, over a round of so many tasks; its database is new."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(url or f"sqlite:///{folder}/labels.db")
        store.open_round("r", [item(n) for n in range(tasks)])
        command = [sys.executable, "-m", "tests.benchmarks.annotate", "--serve", name, store.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found is not None
        try:
            yield store, int(found[1])
        finally:
            process.kill()
            process.communicate()


class Line:
    """A connection that is kept open, as a browser's is."""

    async def open(self, port: int) -> "Line":
        self.port = port
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        return self

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> bytes:
        """The body of the answer; of an event stream all up to the event of completion."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"host": f"127.0.0.1:{self.port}", "content-type": "application/json", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\n{head}content-length: {len(data)}\r\n\r\n".encode() + data
        )
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        assert " 200 " in answer.split("\r\n")[0], answer
        if "transfer-encoding: chunked" not in answer:
            found = re.search(r"content-length: (\d+)", answer)
            assert found is not None, answer
            return await self.reader.readexactly(int(found[1]))
        parts = b""
        while size := int(await self.reader.readline(), 16):
            parts += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()
        return parts


Call = Callable[[Argument], Awaitable[Argument]]


async def caller(name: str, store: Store, port: int, who: int) -> Call:
    """How annotator `who` takes a step on this side."""
    me, line = store.annotator(f"a{who}"), await Line().open(port)
    if name == "plain":

        async def plain(argument: Argument) -> Argument:
            return json.loads(await line.send("POST", "/step", argument, me=str(me)))

        return plain
    if name == "ours":
        cookie = f"{cookie_name(store)}={store.start_session(me)}"
        config = json.loads(await line.send("GET", "/label/config", cookie=cookie))
        [stage] = [c["id"] for c in config["components"] if c["type"] == "html"]
        call = {"component_id": stage, "fn_name": "step", "session_hash": f"s{who}"}

        async def ours(argument: Argument) -> Argument:
            path = "/label/gradio_api/component_server/"
            return json.loads(await line.send("POST", path, call | {"data": argument}, cookie=cookie))

        return ours

    async def queue(argument: Argument) -> Argument:
        join = {"data": [{"me": me, "step": argument}], "fn_index": 0, "session_hash": f"s{who}"}
        await line.send("POST", "/gradio_api/queue/join", join | {"event_data": None, "trigger_id": None})
        stream = await line.send("GET", f"/gradio_api/queue/data?session_hash=s{who}")
        events = [json.loads(part[6:]) for part in stream.split(b"\n\n") if part.startswith(b"data: ")]
        [done] = [event for event in events if event["msg"] == "process_completed"]
        return done["output"]["data"][0]

    return queue


async def label_all(
    name: str, store: Store, port: int, people: int, labels: int, think: float
) -> tuple[float, list[float]]:
    """Labels per second of all, and seconds from each submission to its acknowledgement with the next pairs."""
    calls = [await caller(name, store, port, who) for who in range(people)]
    took: list[float] = []

    async def work(call: Call, dice: random.Random) -> None:
        tasks = (await call({"labels": [], "want": WANT}))["tasks"]
        await asyncio.sleep(dice.uniform(0, think))
        for _ in range(labels):
            label = {"token": f"{tasks[0]['key']}-a", "preference": dice.randint(-3, 3)}
            start = time.perf_counter()
            answer = await call({"labels": [label], "want": WANT})
            took.append(time.perf_counter() - start)
            assert answer["statuses"] == ["saved"]
            tasks = answer["tasks"]
            if think:
                await asyncio.sleep(max(0, dice.uniform(0.5, 1.5) * think - took[-1]))

    start = time.perf_counter()
    await asyncio.gather(*(work(call, random.Random(who)) for who, call in enumerate(calls)))
    return people * labels / (time.perf_counter() - start), took


def load(
    name: str, people: int, labels: int, think: float = 0.0, url: str | None = None
) -> tuple[float, list[float]]:
    with side(name, people * (labels + WANT), url) as (store, port):
        found = asyncio.run(label_all(name, store, port, people, labels, think))
        assert store.progress(1).done == people * labels
    return found


# --- a long list of tasks -------------------------------------------------------------------------------------

NUMBERS = """
create temp table numbers as
  with recursive n(value) as (select 1 union all select value + 1 from n where value < :tasks) select value from n
"""
FILL = """
insert into prompts select 'p' || value, '[{"role": "user", "content": "question ' || value || '"}]' from numbers;
insert into responses select 2 * value + half, 'p' || value, 's' || half, 'reply ' || half
  from numbers, (select 0 as half union all select 1);
insert into tasks (id, round_id, key, prompt_id, response_ids, policies)
  select value + 10, 1, 'k' || value, 'p' || value, '[' || (2 * value) || ',' || (2 * value + 1) || ']', '[]' from numbers;
insert into slots (task_id, round_id, number, priority, active, state, lease)
  select id, 1, number, drawn, 1, 'free', 0
  from (select value + 10 as id, abs(random()) / 9.3e18 as drawn from numbers order by 1),
  (select value - 1 as number from numbers where value <= (select overlap from rounds)) order by id;
"""


def next_pair(tasks: int, steps: int = 500, overlap: int = 1, ahead: int = 0) -> list[float]:
    """Milliseconds of one step (a label in, four pairs held) among so many tasks, without the web, of somebody
    who has labelled `ahead` tasks that nobody else has."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/labels.db")
        store.open_round("r", [], overlap=overlap)
        with sqlite3.connect(f"{folder}/labels.db") as x:
            x.execute(NUMBERS, {"tasks": tasks})
            x.executescript(FILL)
        me, took = store.annotator("ann"), []
        for done in range(0, ahead, 100):
            _, shown = store.step(1, me, want=min(100, ahead - done))
            store.step(1, me, [Label(token=f"{one.key}-a", preference=1) for one in shown])
        _, shown = store.step(1, me, want=WANT)
        for _ in range(steps):
            start = time.perf_counter()
            _, shown = store.step(1, me, [Label(token=f"{shown[0].key}-a", preference=1)], want=WANT)
            took.append((time.perf_counter() - start) * 1000)
        assert store.progress(1).asked == overlap * tasks and store.progress(1).done == ahead + steps
    return took


# --- all of them ----------------------------------------------------------------------------------------------


def rows(size: Size) -> list[tuple[str, str, str]]:
    """(what, measured, target)"""
    found = []

    def say(what: str, measured: str, target: str = "") -> None:
        found.append((what, measured, target))
        print(f"{what}: {measured}" + (f" ({target})" if target else ""), flush=True)

    for latency in (0, 100):
        laid, painted, cold, requests = keys(size.keys, latency)
        where = f"+{latency} ms latency" if latency else "loopback"
        say(
            f"key to next pair laid out, {where}",
            f"p50 {p(laid, 0.5):.1f}, p95 {p(laid, 0.95):.1f} ms",
            "p95 <= 5 ms",
        )
        say("and two frames later", f"p50 {p(painted, 0.5):.0f}, p95 {p(painted, 0.95):.0f} ms")
        if not latency:
            say("entry to first pair, cold", f"{cold:.0f} ms, {requests} requests, all to our host", "< 2 s")
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "queue": []}
    for _ in range(size.turns):
        for name, of in rates.items():
            of.append(load(name, size.people, size.queued if name == "queue" else size.labels)[0])
    for name, text in (
        ("plain", "a plain FastAPI endpoint"),
        ("ours", "ours"),
        ("queue", "Gradio's event queue"),
    ):
        each = ", ".join(f"{rate:.0f}" for rate in rates[name])
        say(f"{size.people} people without a pause, {text}", f"{each} labels/s")
    ratio = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    say("ours / plain", ", ".join(f"{r:.2f}" for r in ratio), ">= 0.5")
    ratio = [a / b for a, b in zip(rates["ours"], rates["queue"], strict=True)]
    say("ours / Gradio's queue", ", ".join(f"{r:.1f}" for r in ratio), ">= 4")
    with postgres.server() as server:
        each = [load("ours", size.people, size.labels, url=server.database())[0] for _ in range(size.turns)]
    text = ", ".join(f"{rate:.0f}" for rate in each)
    say(f"{size.people} people without a pause, ours on PostgreSQL", f"{text} labels/s")
    _, took = load("ours", size.people, max(1, int(size.pace / 4)), think=4.0)
    ms = [1000 * t for t in took]
    say(
        f"{size.people} people, a label in 4 s each",
        f"p50 {p(ms, 0.5):.0f}, p95 {p(ms, 0.95):.0f} ms",
        "p95 <= 50 ms",
    )
    few, many = p(next_pair(1000), 0.95), p(next_pair(size.tasks), 0.95)
    say(f"step among 1,000 and {size.tasks:,} tasks", f"p95 {few:.2f} and {many:.2f} ms", "within 2x")
    first = p(next_pair(size.ahead + 1000, overlap=3), 0.95)
    later = p(next_pair(size.ahead + 1000, overlap=3, ahead=size.ahead), 0.95)
    say(
        f"step of the first, and of one {size.ahead:,} tasks ahead of all others, three labels a task",
        f"p95 {first:.2f} and {later:.2f} ms",
        "within 2x",
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = kill_under_load(f"sqlite:///{folder}/labels.db", size.kills, 8, 1.5)
    say(f"kill -9 under load, {size.kills} times", f"{kept} acknowledged, 0 lost", "0 lost")
    return found


def report(found: Sequence[tuple[str, str, str]]) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    busy = f"load average {os.getloadavg()[0]:.1f} at the end, of which about 2 are ours"
    machine = f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {busy}"
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("gradio", "starlette", "uvicorn", "SQLAlchemy")
    )
    lines = "\n".join(f"| {' | '.join(row)} |" for row in found)
    return f"""# The labelling page

    python -m tests.benchmarks.annotate

{machine}; Python {platform.python_version()}, {libraries}, SQLite {sqlite3.sqlite_version}; {time.strftime("%Y-%m-%d")}.
Server, clients and browser share the machine; every label is on disk before it is acknowledged (`synchronous=FULL`).
Numbers with commas are turns, the sides in alternation.

| | measured | target |
|---|---|---|
{lines}

*Key to next pair*: from the event to the next pair in the document and laid out; a frame follows, which the screen's
rate decides. The page holds three pairs in reserve and sends behind the annotator's back, so latency does not show.
*Plain*: the same checks and the same transaction behind one FastAPI route, with no gate, session or Gradio.
*Gradio's event queue*: the same transaction as a button's event with all of Gradio's defaults.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "URL"))
    args = parser.parse_args()
    if args.serve:
        return serve_side(*args.serve)
    found = rows(QUICK if args.quick else Size())
    if not args.quick:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(report(found))


if __name__ == "__main__":
    main()
