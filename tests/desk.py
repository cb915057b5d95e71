"""A desk to label at: the page served by a process of its own, worked by keyboard in headless Chromium."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from annotate.records import Item
from annotate.store import Current, Store

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--no-first-run"),
]
SERVER = """
import json, sys
from annotate.app import serve
from annotate.form import Form
from annotate.store import Store
url, options = sys.argv[1], json.loads(sys.argv[2])
options["form"] = Form.model_validate(options.get("form", {}))
serve(Store(url), options.pop("round", 1), "a round", **options)
"""
KEYS = {"1": 3, "2": 2, "3": 1, "4": 0, "5": -1, "6": -2, "7": -3}
"""Positive: the reply on the left is better."""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(path).exists():
            message = "no Chromium: `apt-get install chromium`, or `python -m playwright install chromium`"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Served:
    """A database and the page on it, in a process that can be killed and started again on its port."""

    def __init__(
        self,
        folder: Path,
        items: Iterable[Item],
        overlap: int = 20,
        extras: dict[str, Any] | None = None,
        **options: Any,
    ):
        """`extras`: checks and rules of the round. `options` are those of `annotate.app.serve`."""
        self.items = {item.task: item for item in items}
        self.store = Store(f"sqlite:///{folder}/labels.db")
        self.round = self.store.open_round("r", list(self.items.values()), overlap=overlap, **extras or {})
        self.log = folder / "server.log"
        self.options = {"port": 0} | options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, self.store.url, json.dumps(self.options)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", self.said)
        assert found is not None, self.log.read_text()
        self.options["port"] = int(found[1])

    @property
    def port(self) -> int:
        return int(self.options["port"])

    @property
    def home(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def labels(self, who: str) -> dict[str, Current]:
        return {label.task: label for label in self.store.labels(self.round) if label.annotator == who}


class Desk:
    """An annotator at the page."""

    def __init__(self, context: BrowserContext, served: Served, name: str):
        self.page: Page = context.new_page()
        self.served = served
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(served.home)
        self.page.fill("input[name=name]", name)
        self.page.keyboard.press("Enter")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector('.stage[data-state="task"]', timeout=60_000)
        if self.page.is_visible(".guidelines"):  # on the first visit
            self.page.keyboard.press("Enter")
            self.page.wait_for_selector(".guidelines", state="hidden")

    @property
    def task(self) -> str:
        """Task id of what is on the screen, found by its texts; the next may take a moment to be there."""
        self.page.wait_for_selector(".stage:is([data-state='task'], [data-state='past'])", timeout=60_000)
        shown = sorted(self.shown())
        [found] = [t for t, item in self.served.items.items() if sorted(item.completions) == shown]
        return found

    def shown(self) -> list[str]:
        return self.page.eval_on_selector_all(".replies .text", "all => all.map(box => box.textContent)")

    def press(self, key: str) -> None:
        self.page.wait_for_timeout(160)  # past the time in which a key counts as a bounce
        self.page.keyboard.press(key)

    def judge(self, key: str) -> tuple[str, int]:
        """(task, canonical preference that this key means for what is shown)."""
        task, left = self.task, self.shown()[0]
        self.press(key)
        return task, KEYS[key] if left == self.served.items[task].completions[0] else -KEYS[key]

    def sent(self) -> None:
        self.page.wait_for_selector('.stage[data-unsent="0"]', state="attached", timeout=60_000)
