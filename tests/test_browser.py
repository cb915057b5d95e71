"""The real page in headless Chromium, worked by keyboard, and what then lies in the database."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from sqlalchemy import text

from annotate.recording import Label
from annotate.records import Item, Message, prompt_id
from tests.desk import Desk, Served, chromium

HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>${window.hacked=1}{{7*7}} **bold**"
)


def item(number: int) -> Item:
    prompt = [Message(role="user", content=f"question {number} {HOSTILE}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"first {number} {HOSTILE}", f"second {number}\n\n  indented"])


ITEMS = {i.task: i for i in map(item, range(40))}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("browser"), ITEMS.values())
    yield served
    served.kill()


Visit = Callable[..., Desk]


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Visit]:
    contexts = []

    def visit(name: str, to: Served = served, **options: Any) -> Desk:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options))
        return Desk(contexts[-1], to, name)

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
    assert desk.page.get_attribute('.scale [aria-pressed="true"]', "data-value") == "2"
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
    assert all(url.startswith((desk.served.home, "data:", "blob:")) for url in desk.requests)
    desk.page.screenshot(path=tmp_path / "page.png")


def test_both_bad_is_a_tie_that_can_be_revised(visit: Visit, served: Served) -> None:
    desk = visit("nan")
    task = desk.task
    desk.press("0")
    desk.press("u")
    assert desk.task == task
    assert desk.page.get_attribute(".both-bad", "aria-pressed") == "true"
    assert "both bad" in desk.page.inner_text(".question")
    assert desk.page.query_selector('.scale [aria-pressed="true"]') is None
    desk.press("Enter")
    other, _ = desk.judge("4")
    desk.press("u")
    desk.press("0")
    desk.press("u")
    desk.press("u")
    desk.press("4")
    desk.sent()
    query = (
        "select both_bad from judgements where annotator_id = (select id from annotators where name = 'nan')"
    )
    with served.store.connection() as x:
        assert list(x.execute(text(query)).scalars()) == [1, 0, 1, 0]
    assert {t: label.preference for t, label in served.labels("nan").items()} == {task: 0, other: 0}


def test_a_reason_to_skip_can_be_picked(visit: Visit, served: Served) -> None:
    desk = visit("oda")
    desk.press("s")
    desk.page.click("text=it upsets me")
    desk.page.wait_for_function("document.querySelector('.last').textContent.includes('skipped')")
    desk.sent()
    assert "upsetting" in reasons(served) and len(served.labels("oda")) == 1


def test_markdown_and_differences_are_shown_when_asked_for(visit: Visit, tmp_path: Path) -> None:
    replies = ["The **cat** sat\n\n- on\n- it", "The **dog** sat\n\n- on\n- it"]
    served = Served(tmp_path, [plain(n, [f"{reply} {n}" for reply in replies]) for n in range(3)])
    desk = visit("pat", to=served)
    assert desk.page.query_selector(".text :is(b, strong, mark)") is None
    desk.press("x")
    marks = desk.page.eval_on_selector_all("mark", "all => all.map(mark => mark.textContent)")
    assert sorted(marks) == ["cat", "dog"]
    assert sorted(desk.shown()) == sorted(served.items[desk.task].completions)  # not a character changed
    desk.press("m")
    desk.page.wait_for_selector(".replies .rich strong")
    assert desk.page.query_selector("mark") is None
    assert sorted(desk.page.locator(".replies strong").all_inner_texts()) == ["cat", "dog"]
    desk.press("1")
    desk.page.wait_for_selector(".replies .rich li")  # the next pair as well
    desk.page.reload()
    desk.ready()
    desk.page.wait_for_selector(".replies .rich li")  # and the next visit
    desk.press("m")
    assert desk.page.query_selector(".replies .rich li") is None
    served.kill()


def plain(number: int, replies: list[str]) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=replies)


def test_guidelines_come_first_and_again_when_they_change(visit: Visit, tmp_path: Path) -> None:
    items = [plain(n, [f"one {n}", f"two {n}"]) for n in range(9)]
    served = Served(tmp_path, items, guidelines="Prefer the *truth*.")
    desk = visit("quin", to=served)  # reads them
    first = desk.judge("1")[0]
    desk.sent()
    served.kill()
    desk.judge("2")  # under the old ones, whenever it arrives
    served.options["guidelines"] = "Prefer the *kind*.<script>window.hacked=1</script>"
    served.start()
    desk.page.wait_for_selector(".guidelines em:text('kind')", timeout=60_000)
    desk.press("1")  # not before they are read
    assert len(served.labels("quin")) == 2
    desk.page.keyboard.press("Enter")
    desk.judge("3")
    desk.sent()
    desk.press("g")
    assert desk.page.is_visible(".guidelines") and desk.page.evaluate("window.hacked") is None
    query = (
        "select text from judgements join guidelines on sha = judgements.guidelines order by judgements.id"
    )
    with served.store.connection() as x:
        assert [t.split("*")[1] for t in x.execute(text(query)).scalars()] == ["truth", "truth", "kind"]
    assert first in served.labels("quin")
    served.kill()


def test_hidden_characters_are_pointed_out(visit: Visit, tmp_path: Path) -> None:
    served = Served(tmp_path, [plain(0, ["plain \U0001f469\u200d\U0001f52c", "A is better\u202e"])])
    desk = visit("rob", to=served)
    notes = desk.page.locator(".note").all_inner_texts()
    assert [bool(note) for note in notes] == ["\u202e" in reply for reply in desk.shown()]
    served.kill()


def reasons(served: Served) -> list[str]:
    with served.store.connection() as x:
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
    page.goto(served.home)
    page.wait_for_selector('.stage[data-state="task"][data-unsent="0"]', timeout=60_000)
    assert {task: label.preference for task, label in served.labels("cat").items()} == dict(done)
    page.keyboard.press("u")  # and they can be changed after a reload
    page.wait_for_selector('.stage[data-state="past"] [aria-pressed="true"][data-value="0"]')


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
    served = Served(tmp_path, ITEMS.values(), overlap=1)
    desk = visit("hal", to=served)
    mine = desk.task
    with served.store.transaction() as x:
        x.execute(text("update slots set lease_until = 0 where state = 'open'"))
    ivy = served.store.annotator("ivy")
    while views := served.store.step(served.round, ivy, want=20)[1]:
        served.store.step(served.round, ivy, [Label(token=f"{v.key}-0", preference=0) for v in views])
    desk.press("1")
    desk.sent()
    assert "not counted" in desk.page.inner_text(".saving")
    assert mine not in served.labels("hal") and len(served.labels("ivy")) == 40
    served.kill()


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen_and_does_not_move(visit: Visit, width: int, scheme: str) -> None:
    desk = visit(f"viewer {width} {scheme}", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = desk.page
    scale = page.locator(".scale").bounding_box()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ends = "all => all.map(box => box.getBoundingClientRect()).map(box => [box.left, box.right])"
    for left, right in page.eval_on_selector_all("header > *, footer button, .replies article", ends):
        assert 0 <= left <= right <= width
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


def test_labels_on_texts_that_fill_the_browsers_storage_are_kept(visit: Visit, tmp_path: Path) -> None:
    served = Served(tmp_path, [long_item(n) for n in range(6)])
    desk = visit("lou", to=served)
    desk.page.context.set_offline(True)
    for key in "123":  # 2.4 million characters each, where a browser keeps five
        desk.press(key)
    assert desk.page.get_attribute(".stage", "data-unsent") == "3"
    desk.page.close()
    context = desk.page.context
    context.set_offline(False)
    page = context.new_page()
    page.goto(served.home)
    page.wait_for_selector('.stage[data-state="task"][data-unsent="0"]', timeout=60_000)
    assert len(served.labels("lou")) == 3
    served.kill()


def long_item(number: int) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"{number} " + "a" * 1_200_000, f"{number} " + "b" * 1_200_000])


def test_a_reason_with_half_a_character_is_saved(visit: Visit, served: Served) -> None:
    desk = visit("max")
    desk.press("s")
    desk.page.eval_on_selector(".skip-why input", "input => { input.value = 'broken \\ud83d'; }")
    desk.page.keyboard.press("Enter")
    desk.page.wait_for_function("document.querySelector('.last').textContent.includes('skipped')")
    desk.sent()
    assert len(served.labels("max")) == 1 and "broken \ufffd" in reasons(served)
