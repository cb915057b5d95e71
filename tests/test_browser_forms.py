"""Forms on the real page, by keyboard: questions, rankings, grades, flags, reasons, better answers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from annotate.form import Answers
from annotate.records import Item, Message, prompt_id
from annotate.store import Current
from stages import yamlfile
from tests.desk import Desk, Served, chromium

FORMS = Path("configs/forms")
RANKS = {"kind": "ranking", "flags": {"unsafe": "could hurt"}}


def item(number: int, replies: int) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"reply {i} to question {number}" for i in range(replies)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def work(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    """work(form, replies): at a desk with twelve such tasks."""
    open_things: list[Any] = []

    def work(form: dict[str, Any], replies: int, **options: Any) -> Desk:
        served = Served(tmp_path, [item(n, replies) for n in range(12)], form=form)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        open_things.extend([context.close, served.kill])
        return Desk(context, served, "ann")

    yield work
    for close in open_things:
        close()


def test_a_page_open_while_another_round_is_served_loses_nothing(work: Callable[..., Desk]) -> None:
    desk = work({"kind": "pairwise"}, replies=2)
    served = desk.served
    served.kill()
    judged = dict([desk.judge("1"), desk.judge("7")])  # kept in the browser
    ranked = [item(n, 3) for n in range(3)]
    served.options |= {"round": served.store.open_round("other", ranked), "form": RANKS}
    served.start()
    desk.page.wait_for_selector('.stage[data-kind="ranking"][data-state="task"]', timeout=60_000)
    desk.ready()
    assert {task: label.preference for task, label in served.labels("ann").items()} == judged
    for key in "123":
        desk.press(key)
    desk.page.wait_for_selector(".progress:text('1 of 3')")
    desk.sent()
    assert len(served.labels("ann")) == 2
    assert [bool(label.answers.ranking) for label in served.store.labels(served.options["round"])] == [True]


def label(desk: Desk, task: str) -> Current:
    desk.sent()
    return desk.served.labels("ann")[task]


def number(desk: Desk, reply: int) -> str:
    """The key of this reply: its place on the screen, from 1."""
    texts = [text.split()[1] for text in desk.shown()]
    return str(texts.index(str(reply)) + 1)


def question(desk: Desk) -> str:
    return desk.page.inner_text(".question")


def test_attributes_are_asked_one_after_the_other_on_the_same_keys(work: Callable[..., Desk]) -> None:
    desk = work(yamlfile.read(FORMS / "helpful-honest-harmless.yaml"), 2)
    task, first = desk.task, desk.shown()[0]
    turn = 1 if first == desk.served.items[task].completions[0] else -1
    seen = []
    for key in "1", "4", "5":
        seen.append(question(desk))
        desk.press(key)
        assert desk.task == task
    assert seen[0].startswith("4 to go. Which reply helps more") and "wrong or made up" in seen[1]
    assert question(desk).startswith("1 to go. All in all")
    desk.press("u")  # takes the last answer back
    assert "less harm" in question(desk)
    desk.press("7")
    desk.press("2")
    found = label(desk, task)
    assert desk.task != task
    assert found.preference == 2 * turn
    assert found.answers.attributes == {"helpful": 3 * turn, "honest": 0, "harmless": -3 * turn}

    desk.press("u")  # revise it: the answers of before are marked, question by question
    assert desk.task == task and "back you said: A better" in question(desk)
    assert desk.page.get_attribute('.scale [aria-pressed="true"]', "data-value") == "3"
    for key in "6", "6", "6", "6":
        desk.press(key)
    assert label(desk, task).answers.attributes == dict.fromkeys(("helpful", "honest", "harmless"), -2 * turn)
    assert label(desk, task).preference == -2 * turn
    assert desk.faults == []


def test_an_unfinished_task_survives_a_reload(work: Callable[..., Desk]) -> None:
    desk = work(yamlfile.read(FORMS / "helpful-honest-harmless.yaml"), 2)
    task = desk.task
    desk.press("2")
    desk.press("n")
    desk.page.fill("[name=rationale]", "half a thought")
    desk.press("Escape")
    desk.page.wait_for_selector('.more-open[aria-pressed="true"]')
    desk.page.reload()
    desk.ready()
    assert desk.task == task and question(desk).startswith("3 to go.")
    for key in "444":
        desk.press(key)
    assert label(desk, task).answers.rationale == "half a thought"
    assert abs(label(desk, task).answers.attributes["helpful"]) == 2


def test_four_replies_are_ranked_by_number_with_ties(work: Callable[..., Desk]) -> None:
    desk = work(RANKS, 4)
    task = desk.task
    for reply, tie in ((2, False), (0, False), (3, True), (1, False)):
        if tie:
            desk.press("=")
        desk.press(number(desk, reply))
    assert label(desk, task).answers.ranking == [2, 3, 1, 2]
    assert desk.task != task

    desk.press("u")
    badges = desk.page.eval_on_selector_all(".place", "all => all.map(badge => badge.textContent)")
    assert [badges[int(number(desk, r)) - 1] for r in range(4)] == ["2.", "3.", "1.", "2."]
    for reply in (3, 2, 1, 0):
        desk.press(number(desk, reply))
    assert label(desk, task).answers.ranking == [4, 3, 2, 1]
    assert len({tuple(label.order) for label in desk.served.labels("ann").values()}) == 1
    assert desk.faults == []


def test_a_rank_is_taken_back_and_counts_once(work: Callable[..., Desk]) -> None:
    desk = work(RANKS, 3)
    task = desk.task
    one = number(desk, 1)
    desk.press(one)
    desk.press(one)  # has its place already
    desk.press("9")  # no such reply
    desk.press("Backspace")
    assert desk.page.eval_on_selector_all(".place", "all => all.map(b => b.textContent)") == ["", "", ""]
    for reply in (0, 1, 2):
        desk.press(number(desk, reply))
    assert label(desk, task).answers.ranking == [1, 2, 3]
    assert not desk.page.is_visible(".both-bad") and not desk.page.is_visible(".marked")


def test_one_reply_is_graded_and_flagged(work: Callable[..., Desk]) -> None:
    desk = work(yamlfile.read(FORMS / "rating.yaml"), 1)
    task = desk.task
    assert desk.page.eval_on_selector_all(".scale button", "all => all.length") == 5
    desk.press("n")
    desk.page.check("[name=flag-unsafe]")
    desk.press("Escape")
    desk.press("4")
    desk.press("2")
    found = label(desk, task)
    assert found.answers == Answers(rating=2, attributes={"polite": 4}, flags={"unsafe": [0]})
    assert desk.page.inner_text(".last") == "Last: bad"
    assert desk.faults == []


def test_a_better_answer_starts_from_the_one_chosen(work: Callable[..., Desk]) -> None:
    desk = work(yamlfile.read(FORMS / "demonstrations.yaml"), 2)
    task, left = desk.task, desk.shown()[0]
    desk.press("n")
    desk.page.select_option("[name=of]", label="A")
    assert desk.page.input_value("[name=edit]") == left
    desk.page.fill("[name=edit]", "1. a better one\n2. <b>mine</b>")
    desk.page.keyboard.press("Control+Enter")  # a note saves nothing by itself
    desk.page.wait_for_selector(".more", state="hidden")
    assert desk.task == task
    desk.press("3")
    found = label(desk, task).answers.edit
    assert found is not None and found.text == "1. a better one\n2. <b>mine</b>"
    assert desk.served.items[task].completions[found.of] == left


def test_a_note_on_an_earlier_label_is_saved_with_that_label(work: Callable[..., Desk]) -> None:
    desk = work({"attributes": {"honest": "Which is more honest?"}, "rationale": "optional"}, 2)
    task = desk.task
    desk.press("2")
    desk.press("6")
    before = label(desk, task)
    desk.press("u")
    desk.press("n")
    assert "saves this with the label" in desk.page.inner_text(".more")
    desk.page.fill("[name=rationale]", "thought of later")
    desk.page.keyboard.press("Control+Enter")
    desk.page.wait_for_selector(f'[data-state="task"]:not([data-task="{task}"])')
    after = label(desk, task)
    assert after.preference == before.preference and after.answers.attributes == before.answers.attributes
    assert after.answers.rationale == "thought of later"
    desk.press("s")  # of a skip nothing is said but why
    desk.press("Enter")
    desk.press("u")
    desk.press("n")
    desk.page.fill("[name=rationale]", "no more")
    desk.page.keyboard.press("Control+Enter")
    desk.page.wait_for_selector(".more", state="hidden")
    assert desk.page.get_attribute(".stage", "data-state") == "past"
    assert desk.faults == []


def test_a_reason_that_is_asked_for_is_asked_for_once(work: Callable[..., Desk]) -> None:
    desk = work({"rationale": "required"}, 2)
    task = desk.task
    desk.press("1")
    desk.page.wait_for_selector(".more", state="visible")
    assert "asks for a reason" in desk.page.inner_text(".more")
    desk.page.keyboard.press("Control+Enter")  # without one it asks again
    desk.page.wait_for_timeout(100)
    assert desk.page.is_visible(".more") and desk.task == task
    desk.page.keyboard.type("it is shorter")
    desk.page.keyboard.press("Control+Enter")
    desk.page.wait_for_function("document.querySelector('.last').textContent.includes('A much better')")
    assert label(desk, task).answers.rationale == "it is shorter"
    desk.press("s")  # but not of a skip
    desk.page.keyboard.press("Enter")
    desk.page.wait_for_function("document.querySelector('.last').textContent.includes('skipped')")
    desk.sent()
    assert len(desk.served.labels("ann")) == 2


def test_long_answers_kept_offline_arrive_in_messages_the_server_takes(work: Callable[..., Desk]) -> None:
    desk = work({"edit": True, "rationale": "optional"}, 2)
    desk.page.context.set_offline(True)
    for _ in range(4):  # as many as the page holds
        desk.press("n")
        desk.page.fill("[name=rationale]", "\u00e4\u4e2d" * 5000)
        desk.page.select_option("[name=of]", index=1)
        desk.page.fill("[name=edit]", "\t\u4e2d" * 5000)
        desk.page.keyboard.press("Control+Enter")
        desk.page.wait_for_selector(".more", state="hidden")
        desk.press("1")
    assert int(desk.page.get_attribute(".stage", "data-unsent") or 0) == 4
    desk.page.context.set_offline(False)
    desk.sent()
    kept = [label.answers for label in desk.served.labels("ann").values()]
    assert [len(answers.rationale or "") for answers in kept] == [10_000] * 4
    assert all(answers.edit is not None and len(answers.edit.text) == 10_000 for answers in kept)


def test_a_form_on_a_phone(work: Callable[..., Desk], tmp_path: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    desk = work(RANKS, 4, **phone)
    task = desk.task
    wide = desk.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    for reply in (3, 2, 1, 0):
        desk.page.wait_for_timeout(160)
        desk.page.tap(f".scale button:nth-child({number(desk, reply)})")
    assert label(desk, task).answers.ranking == [4, 3, 2, 1]
