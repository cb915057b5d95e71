"""The real page in headless Chromium, worked by keyboard, and what then lies in the database."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from sqlalchemy import text

from annotate.queue import Label
from annotate.records import Item, Message, prompt_id
from annotate.store import Current, Store

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--no-first-run"),
]
SERVER = """
import sys
from annotate.app import serve
from annotate.store import Store
serve(Store(sys.argv[1]), 1, "a round", None, port=int(sys.argv[2]))
"""
KEYS = {"1": 3, "2": 2, "3": 1, "4": 0, "5": -1, "6": -2, "7": -3}
"""Positive: the reply on the left is better."""
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>${window.hacked=1}{{7*7}} **bold**"
)


def item(number: int) -> Item:
    prompt = [Message(role="user", content=f"question {number} {HOSTILE}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"first {number} {HOSTILE}", f"second {number}\n\n  indented"])


ITEMS = {i.task: i for i in map(item, range(40))}


@pytest.fixture(scope="module")
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

    def __init__(self, folder: Path, overlap: int = 20):
        self.store = Store(f"sqlite:///{folder}/labels.db")
        self.round = self.store.open_round("r", list(ITEMS.values()), overlap=overlap)
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, self.store.url, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        assert found is not None
        self.port = int(found[1])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def labels(self, who: str) -> dict[str, Current]:
        return {label.task: label for label in self.store.labels(self.round) if label.annotator == who}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("browser"))
    yield served
    served.kill()


Visit = Callable[..., "Desk"]


class Desk:
    """An annotator at the page."""

    def __init__(self, context: BrowserContext, port: int, name: str):
        self.page: Page = context.new_page()
        self.home = f"http://127.0.0.1:{port}"
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.home)
        self.page.fill("input[name=name]", name)
        self.page.keyboard.press("Enter")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector('.stage[data-state="task"]', timeout=15_000)

    @property
    def task(self) -> str:
        """Task id of what is on the screen, found by its texts."""
        shown = self.shown()
        [found] = [t for t, i in ITEMS.items() if sorted(i.completions) == sorted(shown)]
        return found

    def shown(self) -> list[str]:
        return [
            box.evaluate("box => box.textContent") for box in self.page.query_selector_all(".replies .text")
        ]

    def press(self, key: str) -> None:
        self.page.wait_for_timeout(160)  # past the time in which a key counts as a bounce
        self.page.keyboard.press(key)

    def judge(self, key: str) -> tuple[str, int]:
        """(task, canonical preference that this key means for what is shown)."""
        task, left = self.task, self.shown()[0]
        self.press(key)
        return task, KEYS[key] if left == ITEMS[task].completions[0] else -KEYS[key]

    def sent(self) -> None:
        self.page.wait_for_selector('.stage[data-unsent="0"]', state="attached", timeout=15_000)


@pytest.fixture
def visit(chromium: Browser, served: Served) -> Iterator[Visit]:
    contexts = []

    def visit(name: str, to: Served = served, **options: Any) -> Desk:
        contexts.append(chromium.new_context(**{"viewport": {"width": 1200, "height": 800}} | options))
        return Desk(contexts[-1], to.port, name)

    yield visit
    for context in contexts:
        context.close()


def test_ten_labels_by_keyboard_with_undo_and_skip(visit: Visit, served: Served, tmp_path: Path) -> None:
    desk = visit("ann")
    expected: dict[str, int | None] = {}
    for key in "1234567":
        task, preference = desk.judge(key)
        expected[task] = preference

    skipped = desk.task
    desk.press("s")
    desk.page.keyboard.type("both broken")
    desk.page.keyboard.press("Enter")
    expected[skipped] = None
    while desk.task == skipped:  # a dialog tells of its end a moment after it closed
        desk.page.wait_for_timeout(20)

    last, _ = desk.judge("2")
    desk.press("u")
    assert desk.task == last
    assert desk.page.get_attribute('.scale [aria-pressed="true"]', "data-preference") == "2"
    again, changed = desk.judge("6")
    assert again == last
    expected[last] = changed
    desk.press("Backspace")
    desk.press("u")
    assert desk.task == skipped
    desk.press("Enter")  # leave it as it was
    task, preference = desk.judge("7")
    expected[task] = preference

    desk.sent()
    found = served.labels("ann")
    assert {task: label.preference for task, label in found.items()} == expected and len(found) == 10
    assert {tuple(label.order) for label in found.values()} == {(0, 1), (1, 0)}
    assert desk.page.inner_text(".progress") == "10 of 40"
    assert "both broken" in reasons(served)
    assert desk.faults == []
    assert all(url.startswith((desk.home, "data:", "blob:")) for url in desk.requests)
    desk.page.screenshot(path=tmp_path / "page.png")


def reasons(served: Served) -> list[str]:
    with served.store._read() as x:
        return list(x.execute(text("select reason from judgements where reason is not null")).scalars())


def test_texts_are_shown_exactly_and_do_nothing(visit: Visit) -> None:
    desk = visit("reader")
    shown = desk.page.eval_on_selector(".conversation .text", "box => box.textContent")
    assert shown == ITEMS[desk.task].prompt[0].content
    assert desk.page.evaluate("window.hacked") is None
    assert desk.page.query_selector(".work img") is None


def test_offline_and_back_loses_no_label(visit: Visit, served: Served) -> None:
    desk = visit("bob")
    first = desk.judge("1")
    desk.sent()
    desk.page.context.set_offline(True)
    away = [desk.judge(key) for key in "56"]
    desk.page.wait_for_function("document.querySelector('.saving').textContent.startsWith('no connection')")
    assert desk.page.get_attribute(".stage", "data-unsent") == "2"
    desk.page.context.set_offline(False)
    desk.sent()
    desk.ready()
    found = served.labels("bob")
    assert {task: label.preference for task, label in found.items()} == dict([first, *away])


def test_labels_survive_a_killed_server_and_a_closed_page(visit: Visit, served: Served) -> None:
    desk = visit("cat")
    done = [desk.judge("3")]
    desk.sent()
    served.kill()
    done += [desk.judge("2"), desk.judge("4")]
    assert desk.page.get_attribute(".stage", "data-unsent") == "2"
    assert len(served.labels("cat")) == 1
    context = desk.page.context
    desk.page.close()

    served.start()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector('.stage[data-state="task"][data-unsent="0"]', timeout=15_000)
    assert {task: label.preference for task, label in served.labels("cat").items()} == dict(done)
    page.keyboard.press("u")  # and they can be changed after a reload
    page.wait_for_selector('.stage[data-state="past"] [aria-pressed="true"][data-preference="0"]')


def test_a_bounced_or_held_key_judges_one_pair(visit: Visit, served: Served) -> None:
    desk = visit("dan")
    desk.page.wait_for_timeout(200)
    desk.page.keyboard.press("1")
    desk.page.keyboard.press("1")
    desk.page.keyboard.down("2")
    for _ in range(5):
        desk.page.keyboard.down("2")
    desk.page.keyboard.up("2")
    desk.sent()
    assert len(served.labels("dan")) == 1


def test_keys_do_nothing_behind_a_dialog_or_with_a_modifier(visit: Visit, served: Served) -> None:
    desk = visit("eve")
    desk.press("?")
    desk.press("1")
    assert desk.page.is_visible(".help")
    desk.press("Escape")
    desk.press("Control+1")
    desk.press("s")
    desk.page.keyboard.type("123")
    desk.page.keyboard.press("Escape")
    desk.page.wait_for_timeout(300)
    assert served.labels("eve") == {}


def test_two_people_at_once_do_not_meet(visit: Visit, served: Served) -> None:
    one, two = visit("fay"), visit("gus")
    for key in "17":
        one.judge(key)
        two.judge(key)
    one.sent()
    two.sent()
    assert len(served.labels("fay")) == len(served.labels("gus")) == 2


def test_a_label_after_a_take_over_is_not_counted_and_the_page_says_so(visit: Visit, tmp_path: Path) -> None:
    served = Served(tmp_path, overlap=1)
    desk = visit("hal", to=served)
    mine = desk.task
    with served.store._write() as x:
        x.execute(text("update slots set lease_until = 0 where state = 'open'"))
    ivy = served.store.annotator("ivy")
    while views := served.store.step(served.round, ivy, want=20)[1]:
        served.store.step(served.round, ivy, [Label(token=f"{v.key}-0", preference=0) for v in views])
    desk.press("1")
    desk.sent()
    assert "not counted" in desk.page.inner_text(".saving")
    assert mine not in served.labels("hal") and len(served.labels("ivy")) == 40
    served.kill()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen_and_does_not_move(visit: Visit, width: int, scheme: str) -> None:
    desk = visit(f"viewer {width} {scheme}", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = desk.page
    scale = page.locator(".scale").bounding_box()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    desk.judge("4")
    assert page.locator(".scale").bounding_box() == scale
    desk.press("u")
    assert page.locator(".scale").bounding_box() == scale
    boxes = [page.locator(f".replies article:nth-child({n})").bounding_box() for n in (1, 2)]
    assert boxes[0] is not None and boxes[1] is not None
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 760)
    paper = page.eval_on_selector(".stage", "box => getComputedStyle(box).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
    page.wait_for_timeout(160)
    page.keyboard.press("d")
    assert page.eval_on_selector(".stage", "box => getComputedStyle(box).backgroundColor") != paper


def test_from_key_to_next_pair_takes_no_round_trip(visit: Visit) -> None:
    desk = visit("jan")
    script = """() => {
      const stage = document.querySelector('.stage');
      const before = stage.dataset.task, start = performance.now();
      document.body.dispatchEvent(new KeyboardEvent('keydown', { key: '4', bubbles: true }));
      void stage.offsetHeight;  // layout included
      return stage.dataset.task === before ? null : performance.now() - start;
    }"""
    times = []
    for _ in range(10):
        desk.page.wait_for_timeout(250)
        times.append(desk.page.evaluate(script))
    assert None not in times
    print("key to next pair, ms:", sorted(times))
    assert sorted(times)[8] < 50  # on a busy machine; a round trip alone would take longer than the median
