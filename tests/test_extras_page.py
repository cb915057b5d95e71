"""Checks, repeats and the state of a round as the browser meets them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page

from annotate import quality
from annotate.records import Item, Message, prompt_id
from annotate.rules import Check, Qualify, Rules
from tests.desk import Desk, Served, chromium
from tests.test_app import Browser


def item(number: int) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"good {number}", f"bad {number}"])


def check(number: int, feedback: str | None = None) -> Check:
    """In its texts like any other."""
    return Check(
        **item(100 + number).model_dump(include={"prompt", "completions"}), better=0, feedback=feedback
    )


SILENT = [check(n) for n in range(3)]
HOSTILE = "<img src=x onerror='window.hacked=1'>${window.hacked=1}"


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    extras = {"checks": SILENT, "rules": Rules(repeats=0.3)}
    served = Served(tmp_path_factory.mktemp("silent"), [item(n) for n in range(30)], extras=extras)
    yield served
    served.kill()


def is_check(task: dict[str, Any]) -> bool:
    return int(task["messages"][0]["content"].split()[1]) >= 100


def shift(browser: Browser) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(task, answer to its label) of everything there is to label."""
    done, answer = [], browser.step(want=4)
    while answer["tasks"]:
        task = answer["tasks"][0]
        preference = 2 if task["completions"][0].startswith("good") else -2
        answer = browser.step({"token": task["key"] + "-a", "preference": preference}, want=4, count=True)
        done.append((task, answer))
    return done


def test_the_browser_cannot_tell_a_check_or_a_repeat_from_any_other_task(silent: Served) -> None:
    done = shift(Browser(silent, "ann"))
    keys = [task["key"] for task, _ in done]
    assert len(done) > 38 and len(set(keys)) == len(keys)
    assert {frozenset(task) for task, _ in done} == {frozenset({"key", "messages", "completions"})}
    assert {(len(key), key.split("-")[1]) for key in keys} == {(len("1" * 19 + "-0"), "0")}
    numbers = sorted(int(key.split("-")[0]) for key in keys)
    extra = {
        int(t["key"].split("-")[0]) for n, (t, _) in enumerate(done) if is_check(t) or is_repeat(done, n)
    }
    places = [numbers.index(number) for number in extra]
    assert (
        len(extra) > 8 and min(places) < 15 and max(places) > len(numbers) - 15
    )  # anywhere among the others
    shapes = {frozenset(answer) - {"standing"} for _, answer in done}
    assert shapes == {frozenset({"ok", "statuses", "tasks", "served", "feedback", "progress"})}
    assert {json.dumps(answer["feedback"]) for _, answer in done} == {"[]"}
    steps = [answer["progress"]["done"] for _, answer in done]
    assert steps == list(range(1, len(done) + 1))  # each moves the bar
    assert {answer["progress"]["asked"] for _, answer in done} == {len(done)}


def is_repeat(done: list[tuple[dict[str, Any], Any]], place: int) -> bool:
    return any(task["messages"] == done[place][0]["messages"] for task, _ in done[:place])


def test_history_and_markdown_know_extras_by_the_same_keys(silent: Served) -> None:
    bob = Browser(silent, "bob")
    done = [task for task, _ in shift(bob)]
    history = bob.call("hello", {})[1]["history"]
    assert [past["key"] for past in history] == [task["key"] for task in done][-20:]
    some = [task["key"] for task in done if is_check(task)]
    assert list(bob.call("markdown", {"keys": some})[1]["html"]) == some
    assert bob.step({"token": some[0] + "-b", "preference": 0})["statuses"] == ["saved"]  # a correction
    assert Browser(silent, "eve").step({"token": some[0] + "-c", "preference": 0})["statuses"] == ["refused"]


def test_a_bare_slot_number_gets_no_text_and_its_label_is_refused(silent: Served) -> None:
    """Else one could find out which slots are one's own, and so which of one's tasks were made late."""
    cat = Browser(silent, "cat")
    [task] = cat.step(want=1)["tasks"]
    me = silent.store.annotator("cat")
    [shown] = silent.store.step(silent.round, me, want=1)[1]
    assert shown.key != task["key"] and shown.completions == task["completions"]
    assert cat.call("markdown", {"keys": [shown.key]})[1] == {"ok": True, "html": {}}
    assert cat.step({"token": shown.key + "-a", "preference": 1})["statuses"] == ["refused"]
    both = [{"token": f"{key}-a", "preference": 1} for key in ("9" * 19 + "-1", shown.key, task["key"])]
    answer = cat.call("step", {"labels": both, "want": 0})[1]
    assert answer["statuses"] == ["refused", "refused", "saved"]


def test_feedback_comes_with_the_answer_and_again_with_a_retry(tmp_path: Path) -> None:
    extras = {"checks": [check(0, HOSTILE), check(1)], "rules": Rules(qualify=Qualify(checks=2, right=0.5))}
    served = Served(tmp_path, [item(n) for n in range(9)], extras=extras)
    ann = Browser(served, "ann")
    first, second = ann.step(want=4)["tasks"]
    assert "feedback" not in json.dumps(first) and HOSTILE not in json.dumps(first)
    label = {"token": first["key"] + "-a", "preference": 2 if first["completions"][0] == "bad 100" else -2}
    told = {"token": label["token"], "right": False, "text": HOSTILE}
    for status in ("saved", "duplicate"):
        answer = ann.step(label)
        assert (answer["statuses"], answer["feedback"]) == ([status], [told])
    bad = {"token": second["key"] + "-a", "preference": 0}
    assert ann.step(bad, want=4)["standing"] == "unqualified"
    for state in ("paused", "closed"):
        quality.set_state(served.store, served.round, state)  # type: ignore[arg-type]
        assert ann.step(want=1)["standing"] == state
    served.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as browser:
        yield browser


def question(page: Page) -> int:
    return int(page.inner_text(".message .text").split()[1])


def judge(desk: Desk, better: str = "good") -> tuple[int, list[str]]:
    """Press for the better one; (number of the question, replies as shown)."""
    number, shown, key = question(desk.page), desk.shown(), desk.page.get_attribute(".stage", "data-task")
    desk.press("2" if shown[0].startswith(better) else "6")
    desk.page.wait_for_function("key => document.querySelector('.stage').dataset.task !== key", arg=key)
    return number, shown


def test_a_shift_with_a_check_told_of_a_pause_a_repeat_and_the_end(browser: Chromium, tmp_path: Path) -> None:
    extras = {"checks": [check(0, f"Prices matter. {HOSTILE}")], "rules": Rules(repeats=0.5, at_most=16)}
    served = Served(tmp_path, [item(n) for n in range(20)], extras=extras)
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    desk = Desk(context, served, "ann")
    seen: dict[int, list[str]] = {}
    while 100 not in seen:
        number, shown = judge(desk, "bad" if question(desk.page) == 100 else "good")
        seen[number] = shown
    desk.page.wait_for_selector(".checked", state="visible")
    said = desk.page.inner_text(".checked")
    assert "That was not right" in said and "question 100" in said and f"Prices matter. {HOSTILE}" in said
    desk.press("1")  # nothing is judged behind it
    desk.page.screenshot(path=tmp_path / "checked.png")
    desk.page.keyboard.press("Enter")
    desk.page.wait_for_selector(".checked", state="hidden")

    desk.sent()
    quality.set_state(served.store, served.round, "paused")
    while desk.page.get_attribute(".stage", "data-state") == "task":
        number, shown = judge(desk)
        seen[number] = shown
        desk.sent()
    desk.page.wait_for_function("document.querySelector('.empty').textContent.startsWith('Paused')")
    stored = len(served.labels("ann"))
    quality.set_state(served.store, served.round, "open")
    desk.page.wait_for_selector('.stage[data-state="task"]', timeout=60_000)  # by itself

    again = None
    while again is None:
        number, shown = judge(desk)
        if number in seen:
            again = number
            assert shown == seen[number][::-1]
        seen[number] = shown
    desk.sent()
    while desk.page.get_attribute(".stage", "data-state") == "task":
        judge(desk)
        desk.sent()
    desk.page.wait_for_function("document.querySelector('.empty').textContent.includes('as much as one')")
    assert len(served.labels("ann")) == 16 > stored
    pairs = quality.repeated(served.store, served.round)
    assert pairs and {pair.alike for pair in pairs} == {1.0}
    assert [answer.right for answer in quality.accuracy(served.store, served.round)] == [False]
    assert desk.faults == [] and desk.page.evaluate("window.hacked") is None
    context.close()
    served.kill()


def test_a_page_that_is_open_when_the_round_closes_says_so(browser: Chromium, tmp_path: Path) -> None:
    served = Served(tmp_path, [item(n) for n in range(9)])
    context = browser.new_context()
    desk = Desk(context, served, "ann")
    judge(desk)
    desk.sent()
    quality.set_state(served.store, served.round, "closed")
    judge(desk)
    desk.page.wait_for_function("document.querySelector('.empty').textContent.includes('is closed')")
    assert "1 not counted: the round was closed" in desk.page.inner_text(".saving")
    assert len(served.labels("ann")) == 1
    context.close()
    served.kill()


def test_labels_that_came_while_the_round_was_closed_are_asked_for_again_when_it_opens(
    browser: Chromium, tmp_path: Path
) -> None:
    served = Served(tmp_path, [item(n) for n in range(4)])
    context = browser.new_context()
    desk = Desk(context, served, "ann")
    context.set_offline(True)
    for _ in range(4):
        key = desk.page.get_attribute(".stage", "data-task")
        desk.press("2")
        desk.page.wait_for_function("key => document.querySelector('.stage').dataset.task !== key", arg=key)
    desk.press("u")  # looks at one of them meanwhile
    quality.set_state(served.store, served.round, "closed")
    context.set_offline(False)
    desk.sent()
    assert "4 not counted: the round was closed" in desk.page.inner_text(".saving")
    quality.set_state(served.store, served.round, "open")
    desk.page.keyboard.press("Enter")
    for done in range(1, 5):
        desk.page.wait_for_selector('.stage[data-state="task"]', timeout=60_000)
        desk.press("2")
        desk.sent()
        assert len(served.labels("ann")) == done
    assert desk.page.inner_text(".progress") == "4 of 4" and desk.faults == []
    context.close()
    served.kill()
