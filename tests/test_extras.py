"""Checks, qualification, limits, repeats, and the state of a round: what is handed out and what counts."""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, text

from annotate import extras, quality
from annotate.form import Answers, Form
from annotate.keys import FIRST, hidden, plain
from annotate.queue import Shown
from annotate.recording import Label
from annotate.records import DataError, Message
from annotate.rules import APART, Check, Known, Qualify, Rules
from annotate.store import Progress, Store
from tests.test_store import counts, item

ITEMS = [item(n) for n in range(60)]
OF_TASK = {i.task: i for i in ITEMS}


def check(number: int, feedback: str | None = None, replies: int = 2) -> Check:
    prompt = [Message(role="user", content=f"check {number}")]
    texts = [f"good {number}", *(f"bad {n} {number}" for n in range(1, replies))]
    return Check(prompt=prompt, completions=texts, better=0, feedback=feedback)


CHECKS = [check(n) for n in range(5)]


@pytest.fixture
def store(fresh: Callable[[], str]) -> Iterator[Store]:
    store = Store(fresh())
    yield store
    store.close()


Judge = Callable[[Shown], int | None]


def right(view: Shown) -> int:
    """The first completion of an item, and the good one of a check."""
    return 2 if view.completions[0].startswith(("good", "first")) else -2


def wrong(view: Shown) -> int:
    return -right(view)


def work(
    store: Store, round_id: int, who: str, judge: Judge = right, most: int = 10_000, want: int = 4
) -> list[Shown]:
    """Label as the page does, four in hand; returns the tasks in the order in which they were judged."""
    me, seen = store.annotator(who), []
    _, views = store.step(round_id, me, want=want)
    while views and len(seen) < most:
        seen.append(views[0])
        label = Label(token=f"{views[0].key}-0", preference=judge(views[0]))
        statuses, views = store.step(round_id, me, [label], want=want)
        assert statuses == ["saved"]
    return seen


def is_check(view: Shown) -> bool:
    return view.messages[0]["content"].startswith("check")


def places(seen: list[Shown]) -> list[int]:
    return [place for place, view in enumerate(seen) if is_check(view)]


def test_everyone_gets_every_check_once_among_the_other_tasks(store: Store, fresh: Callable[[], str]) -> None:
    round_id = store.open_round("r", ITEMS, overlap=2, checks=CHECKS, salt="3")
    orders = []
    for who in ("ann", "bob"):
        seen = work(store, round_id, who)
        assert Counter(view.task for view in seen) == dict.fromkeys([*OF_TASK, *(c.task for c in CHECKS)], 1)
        found = places(seen)
        assert found[0] <= 4 and all(1 <= later - earlier <= 22 for earlier, later in pairwise(found))
        assert found[-1] < 60
        orders.append((found, [view.task for view in seen if is_check(view)]))
    assert orders[0] != orders[1]
    other = Store(fresh())
    again = work(other, other.open_round("r", ITEMS, overlap=2, checks=CHECKS, salt="3"), "ann")
    assert (places(again), [v.task for v in again if is_check(v)]) == orders[0]


def test_checks_are_in_no_label_and_no_progress_of_the_round(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], overlap=2, checks=CHECKS)
    work(store, round_id, "ann")
    assert {label.task for label in store.labels(round_id)} == {i.task for i in ITEMS[:20]}
    assert store.progress(round_id) == Progress(40, 20)
    me = store.annotator("ann")
    assert quality.progress(store, round_id, me) == Progress(25, 25)
    bob = quality.progress(store, round_id, store.annotator("bob"))
    assert bob == Progress(25, 0)
    work(store, round_id, "bob", most=12)
    assert quality.progress(store, round_id, store.annotator("bob")) == Progress(25, 12)


def test_accuracy_is_by_annotator_and_a_skip_is_not_right(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], overlap=3, checks=CHECKS)
    work(store, round_id, "ann")
    work(store, round_id, "bob", wrong)
    work(store, round_id, "cat", lambda view: None)
    answers = quality.accuracy(store, round_id)
    by = {who: [a.right for a in answers if a.annotator == who] for who in ("ann", "bob", "cat")}
    assert by == {"ann": [True] * 5, "bob": [False] * 5, "cat": [False] * 5}
    share = quality.share_right(answers)
    assert share is not None and share.value == pytest.approx(1 / 3)
    assert quality.share_right([]) is None


def test_of_a_check_with_feedback_the_first_answer_counts_and_else_the_last(store: Store) -> None:
    told, silent = check(0, "It names the order."), check(1)
    round_id, me = store.open_round("r", ITEMS[:20], checks=[told, silent]), store.annotator("ann")
    seen = {view.task: view for view in work(store, round_id, "ann", wrong)}
    tokens = [f"{view.key}-0" for view in seen.values()]
    assert quality.feedback(store, me, tokens) == [(f"{seen[told.task].key}-0", False, "It names the order.")]
    assert quality.feedback(store, store.annotator("bob"), tokens) == []
    again = [Label(token=f"{seen[c.task].key}-1", preference=right(seen[c.task])) for c in (told, silent)]
    assert store.step(round_id, me, again)[0] == ["saved"] * 2
    assert quality.feedback(store, me, [label.token for label in again]) == []
    assert {a.task: a.right for a in quality.accuracy(store, round_id)} == {
        told.task: False,
        silent.task: True,
    }


def test_other_checks_replace_those_there_were_and_keep_their_answers(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], overlap=2, checks=CHECKS[:2])
    work(store, round_id, "ann")
    better = [check(1).model_copy(update={"better": 1}), check(7)]
    assert store.open_round("r", ITEMS[:20], overlap=2, checks=better) == round_id
    seen = work(store, round_id, "bob")
    assert {view.messages[0]["content"] for view in seen if is_check(view)} == {"check 1", "check 7"}
    of_ann = {a.task: (a.right, a.place) for a in quality.accuracy(store, round_id) if a.annotator == "ann"}
    assert of_ann == {CHECKS[0].task: (True, None), CHECKS[1].task: (False, 0)}
    store.open_round("r", [*ITEMS[:18], *ITEMS[40:50]], overlap=2, checks=better)
    assert [v.messages[0]["content"] for v in work(store, round_id, "ann") if is_check(v)] == ["check 7"]
    store.open_round("r", ITEMS[:20], overlap=3)
    assert places(work(store, round_id, "cat")) == []
    assert len(quality.accuracy(store, round_id)) == 5


QUALIFY = Rules(qualify=Qualify(checks=3, right=0.6))


def test_who_qualifies_goes_on_and_who_does_not_gets_nothing(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], overlap=2, checks=CHECKS, rules=QUALIFY)
    half = iter([right, wrong, right])
    seen = work(store, round_id, "ann", lambda view: next(half, right)(view))
    assert [view.task for view in seen[:3]] == [c.task for c in CHECKS[:3]] and len(seen) == 25
    assert not is_check(seen[3]) or not is_check(seen[4])  # the others are mixed in

    half = iter([right, wrong, wrong])
    assert len(work(store, round_id, "bob", lambda view: next(half)(view))) == 3
    bob = store.annotator("bob")
    assert store.step(round_id, bob, want=4)[1] == []
    assert quality.standing(store, round_id, bob) == "unqualified"
    assert quality.standing(store, round_id, store.annotator("ann")) == "open"
    assert store.progress(round_id) == Progress(40, 20)


def test_who_does_not_qualify_gets_nothing_by_another_answer_and_who_does_goes_on(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], overlap=2, checks=CHECKS, rules=QUALIFY)
    for who, judge, then, standing in (("ann", wrong, right, "unqualified"), ("bob", right, wrong, "open")):
        me, seen = store.annotator(who), work(store, round_id, who, judge, most=3)
        again = [Label(token=f"{view.key}-1", preference=then(view)) for view in seen]
        statuses, views = store.step(round_id, me, again, want=4)
        assert statuses == ["saved"] * 3 and bool(views) == (standing == "open")
        assert quality.standing(store, round_id, me) == standing


def test_nothing_else_is_handed_out_before_the_last_qualifying_check_is_answered(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], checks=CHECKS, rules=QUALIFY)
    me = store.annotator("ann")
    _, views = store.step(round_id, me, want=10)
    assert [is_check(view) for view in views] == [True] * 3
    assert store.step(round_id, me, want=10)[1] == views
    assert quality.standing(store, round_id, me) == "open"
    _, left = store.step(round_id, me, [Label(token=f"{v.key}-0", preference=right(v)) for v in views[:2]], 9)
    assert left == views[2:]
    last = Label(token=f"{views[2].key}-0", preference=right(views[2]))
    assert any(not is_check(view) for view in store.step(round_id, me, [last], want=10)[1])


def test_qualifying_needs_as_many_checks(store: Store) -> None:
    with pytest.raises(DataError, match="takes 3 checks, and there are 2"):
        store.open_round("r", ITEMS, checks=CHECKS[:2], rules=QUALIFY)


def test_nobody_gives_more_labels_than_one_person_may(store: Store) -> None:
    rules = Rules(at_most=7, repeats=0.5)
    round_id = store.open_round("r", ITEMS[:20], overlap=2, checks=CHECKS[:2], rules=rules)
    me = store.annotator("ann")
    seen = work(store, round_id, "ann")
    assert len(places(seen)) == 2 and len(seen) == 9
    assert store.progress(round_id).done == 7
    assert quality.standing(store, round_id, me) == "finished"
    assert quality.progress(store, round_id, me) == Progress(9, 9)
    assert len(work(store, round_id, "bob", most=3)) == 3  # others go on
    store.open_round("r", ITEMS[:20], overlap=2, rules=Rules(at_most=8))
    assert len(work(store, round_id, "ann")) == 1


def test_repeats_come_later_in_reversed_order_and_do_not_count(store: Store) -> None:
    round_id = store.open_round("r", ITEMS, overlap=2, rules=Rules(repeats=0.2), salt="5")
    for who in ("ann", "bob"):
        seen = work(store, round_id, who)
        first: dict[str, int] = {}
        again = 0
        for place, view in enumerate(seen):
            if view.task in first:
                before = seen[first[view.task]]
                assert view.completions == before.completions[::-1] and view.messages == before.messages
                assert view.key != before.key and place - first[view.task] > APART
                again += 1
            first.setdefault(view.task, place)
        assert len(first) == 60 and 8 <= again <= 12
        me = store.annotator(who)
        assert quality.progress(store, round_id, me) == Progress(len(seen), len(seen))
        assert len(store.history(round_id, me, 200)) == len(seen)  # and can be corrected as any other
    assert len(store.labels(round_id)) == 120 == store.progress(round_id).done
    assert counts(store, "select count(*) from tasks where round_id > 1") <= 24


def test_two_who_are_due_for_the_same_repeats_at_once_both_get_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adds one that the other wants next, unless one of them waits."""
    round_id = store.open_round("r", ITEMS, overlap=2, rules=Rules(repeats=100), salt="2")
    people = [store.annotator(who) for who in ("ann", "bob")]
    for me in people:
        _, views = store.step(round_id, me, want=12)
        said = [Label(token=f"{v.key}-0", preference=2 if n < 2 else None) for n, v in enumerate(views)]
        assert store.step(round_id, me, said)[0] == ["saved"] * 12
    both, repeat = Barrier(2), extras._repeat

    def slow(*args: Any) -> Any:
        found = repeat(*args)
        with contextlib.suppress(BrokenBarrierError):
            both.wait(0.5)
        return found

    monkeypatch.setattr(extras, "_repeat", slow)
    with ThreadPoolExecutor(2) as pool:
        steps = [pool.submit(store.step, round_id, me, (), 2) for me in people]
        ann, bob = ([view.task for view in step.result(timeout=60)[1]] for step in steps)
    assert set(ann) == {view.task for view in views[:2]} and ann == bob[::-1]


def test_consistency_and_lean_are_those_of_the_two_showings(store: Store) -> None:
    round_id = store.open_round("r", ITEMS, overlap=4, rules=Rules(repeats=0.2))
    work(store, round_id, "ann")  # always the same completion
    work(store, round_id, "bob", lambda view: 2)  # always what stands first
    work(store, round_id, "cat", lambda view: 0)
    skipped = work(store, round_id, "dan", lambda view: None)
    assert len(skipped) == 60  # what was skipped is not asked again
    pairs = quality.repeated(store, round_id)
    shares = {
        who: {pair.alike for pair in pairs if pair.annotator == who} for who in ("ann", "bob", "cat", "dan")
    }
    assert shares == {"ann": {1.0}, "bob": {0.0}, "cat": {1.0}, "dan": set()}
    mine = [pair for pair in pairs if pair.annotator == "ann"]
    whole, ann, bob = (
        quality.lean(some) for some in (pairs, mine, [pair for pair in pairs if pair.annotator == "bob"])
    )
    assert ann is not None and bob is not None and whole is not None
    assert (ann.value, bob.value) == (0.5, 1.0) and 0.5 < whole.value < 1
    overall = quality.consistency(pairs)
    assert overall is not None and 0.4 < overall.low < overall.value < overall.high < 0.9
    assert quality.consistency([]) is None


def test_a_repeat_and_a_check_survive_a_reload_and_an_expired_lease(store: Store) -> None:
    """They are of one person: nobody takes them over, and their label counts however late."""
    rules = Rules(repeats=0.5)
    round_id = store.open_round("r", ITEMS, lease=0.01, overlap=2, checks=CHECKS, rules=rules)
    ann, bob = store.annotator("ann"), store.annotator("bob")
    seen = work(store, round_id, "ann", most=14)
    _, views = store.step(round_id, ann, want=6)
    tasks = {view.task for view in seen}
    extra = [view for view in views if is_check(view) or view.task in tasks]
    assert extra
    time.sleep(0.02)
    assert Store(store.url).step(round_id, ann, want=6)[1] == views
    time.sleep(0.02)
    held = {view.key.split("-")[0] for view in store.step(round_id, bob, want=60)[1]}
    assert not held & {view.key.split("-")[0] for view in extra}
    labels = [Label(token=f"{view.key}-0", preference=1) for view in extra]
    assert set(store.step(round_id, ann, labels)[0]) == {"saved"}


def test_the_same_label_twice_is_one_and_of_another_person_none(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:20], checks=CHECKS)
    ann, bob = store.annotator("ann"), store.annotator("bob")
    [view] = [v for v in store.step(round_id, ann, want=8)[1] if is_check(v)][:1]
    label = Label(token=f"{view.key}-0", preference=1)
    assert store.step(round_id, bob, [label])[0] == ["refused"]
    assert store.step(round_id, ann, [label, label])[0] == ["saved", "duplicate"]
    assert store.held(round_id, ann, [view.key]) == [view]


def test_a_paused_round_hands_out_nothing_and_takes_what_was_handed_out(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS, checks=CHECKS), store.annotator("ann")
    _, views = store.step(round_id, me, want=4)
    quality.set_state(store, round_id, "paused")
    assert quality.state(store, round_id) == quality.standing(store, round_id, me) == "paused"
    labels = [Label(token=f"{view.key}-0", preference=1) for view in views]
    assert store.step(round_id, me, labels[:1], want=4) == (["saved"], views[1:])
    assert store.step(round_id, me, labels[1:], want=4) == (["saved"] * 3, [])
    assert store.open_round("r", ITEMS, checks=CHECKS) == round_id  # and reopening leaves it so
    assert store.step(round_id, store.annotator("bob"), want=4)[1] == []
    quality.set_state(store, round_id, "open")
    assert len(store.step(round_id, me, want=4)[1]) == 4


def test_what_comes_to_a_closed_round_is_kept_and_not_counted(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS, checks=CHECKS), store.annotator("ann")
    _, views = store.step(round_id, me, want=8)
    extra = next(view for view in views if is_check(view))
    plain_ones = [view for view in views if not is_check(view)]
    store.step(round_id, me, [Label(token=f"{plain_ones[0].key}-0", preference=1)])
    quality.set_state(store, round_id, "closed")
    late = [Label(token=f"{view.key}-1", preference=-1) for view in (extra, *plain_ones[:2])]
    assert store.step(round_id, me, late, want=4) == (["late"] * 3, [])  # a correction as well
    assert store.step(round_id, me, late)[0] == ["duplicate"] * 3
    assert [abs(label.preference or 0) for label in store.labels(round_id)] == [1]
    assert quality.accuracy(store, round_id) == []
    assert counts(store, "select count(*) from judgements where rev is null") == 3
    quality.set_state(store, round_id, "open")
    again = Label(token=f"{plain_ones[1].key}-2", preference=1)
    assert store.step(round_id, me, [again])[0] == ["saved"]


def test_priorities_and_extras_go_together(store: Store) -> None:
    items = [i.model_copy(update={"priority": float(n)}) for n, i in enumerate(ITEMS)]
    round_id = store.open_round("r", items, checks=CHECKS, rules=Rules(repeats=0.1))
    seen = work(store, round_id, "ann")
    first: list[str] = list(dict.fromkeys(view.task for view in seen if not is_check(view)))
    assert first == [i.task for i in reversed(ITEMS)]
    assert len(places(seen)) == 5 and len(seen) > 65


def test_rankings_are_checked_by_what_comes_first_and_repeated_in_reverse(store: Store) -> None:
    replies = ("first", "second", "third")
    items = [item(n, replies) for n in range(40)]
    checks = [check(n, replies=3) for n in range(3)]
    round_id = store.open_round("r", items, checks=checks, rules=Rules(repeats=0.3))
    me, name = store.annotator("ann"), store.form(Form(kind="ranking"))
    shown: dict[str, list[list[str]]] = {}
    dice = random.Random(0)
    while views := store.step(round_id, me, want=4)[1]:
        order = sorted(
            views[0].completions, key=lambda text: "first good second bad 1 third bad 2".find(text[:4])
        )
        ranking = [order.index(text) + 1 for text in views[0].completions]
        if is_check(views[0]):
            ranking = dice.choice([ranking, [1, 1, 1]])
        label = Label(token=f"{views[0].key}-0", preference=None, form=name, answers=Answers(ranking=ranking))
        assert store.step(round_id, me, [label])[0] == ["saved"]
        shown.setdefault(views[0].task, []).append(views[0].completions)
    twice = [orders for orders in shown.values() if len(orders) == 2]
    assert twice and all(one == two[::-1] for one, two in twice)
    pairs = quality.repeated(store, round_id)
    assert len(pairs) == len(twice) and {pair.alike for pair in pairs} == {1.0}
    assert len(quality.accuracy(store, round_id)) == 3
    assert quality.lean(pairs) is None


def test_an_answer_is_right_when_it_puts_the_better_one_first() -> None:
    one, other = (Known(better=better, feedback=None, place=0) for better in (0, 1))
    assert [one.right(p, Answers()) for p in (3, 1, 0, -1, None)] == [True, True, False, False, False]
    assert [other.right(p, Answers()) for p in (3, 0, -1)] == [False, False, True]
    ranked = {(1, 2, 3): False, (2, 1, 3): True, (1, 1, 2): False, (2, 1, 2): True}
    assert {r: other.right(None, Answers(ranking=list(r))) for r in ranked} == ranked


@given(
    rules=st.builds(
        Rules,
        checks=st.integers(0, 30),
        every=st.integers(1, 10),
        repeats=st.floats(0, 0.5),
        at_most=st.none() | st.integers(1, 50),
    ),
    salt=st.text(max_size=3),
    rooms=st.lists(st.integers(1, 9), max_size=20),
)
def test_the_plan_does_not_depend_on_how_many_are_asked_for_at_once(
    rules: Rules, salt: str, rooms: list[int]
) -> None:
    """Where every task is labelled before the next is handed out."""

    def run(rooms: list[int]) -> list[str]:
        given, kinds = [0, 0, 0], []
        for room in rooms:
            for kind in rules.model_copy(update={"repeats": 0}).plan(salt, "ann", given, given[0], 0, room):
                given[("label", "check", "repeat").index(kind)] += 1
                kinds.append(kind)
        return kinds

    whole = run([sum(rooms)]) if rooms else []
    assert run(rooms) == whole
    labels = whole.count("label")
    assert rules.at_most is None or labels <= rules.at_most
    assert whole.count("check") <= rules.checks
    assert rules.model_copy(update={"repeats": 0}).extra(salt, "ann", labels) >= whole.count("check")


@given(slot=st.integers(1, 2**42 - 1), lease=st.integers(1, 2**20 - 1), secret=st.text(max_size=9))
def test_hidden_keys_are_found_again_and_look_alike(slot: int, lease: int, secret: str) -> None:
    key = f"{slot}-{lease}-ab"
    there = hidden(secret, key)
    assert plain(secret, there) == key and there.endswith("-0-ab") and plain(secret, key) == key
    assert len(there) == len(f"{FIRST}-0-ab") and there != hidden(secret + "x", key)


def test_numbers_made_one_after_the_other_are_far_apart_when_hidden() -> None:
    numbers = [int(hidden("secret", f"{slot}-1")[:19]) for slot in range(1, 2001)]
    assert len(set(numbers)) == 2000
    rises = sum(a < b for a, b in pairwise(numbers))
    assert 900 < rises < 1100 and max(numbers) - min(numbers) > 2**61


def test_the_database_of_a_round_with_extras_is_sound(store: Store) -> None:
    from annotate.care import check as look

    round_id = store.open_round("r", ITEMS, overlap=2, checks=CHECKS, rules=Rules(repeats=0.2))
    for who in ("ann", "bob"):
        work(store, round_id, who, most=40)
    found, faults = look(store.url)
    assert faults == []
    labels = len(store.labels(round_id))
    assert found["labels that count"] == labels
    assert found["answers to checks"] == len(quality.accuracy(store, round_id)) > 5
    assert found["repeats"] == len(quality.repeated(store, round_id)) > 5
    assert found["said in all"] == 80 == labels + found["answers to checks"] + found["repeats"]
    with store.transaction() as x:
        x.execute(text("update slots set reserved_id = null where number = 1 and round_id > 1"))
        x.execute(
            text(
                "update tasks set known = null where id = (select max(id) from tasks where known is not null)"
            )
        )
    assert len(look(store.url)[1]) == 2


def statements(store: Store, round_id: int, me: int) -> int:
    """How many statements it takes to record a label and hand out the next task."""
    seen: list[str] = []
    [view, *_] = store.step(round_id, me, want=4)[1]

    def count(connection: object, cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(store._engine, "before_cursor_execute", count)
    store.step(round_id, me, [Label(token=f"{view.key}-0", preference=2)], want=4)
    event.remove(store._engine, "before_cursor_execute", count)
    return len(seen)


def test_a_step_takes_as_many_statements_after_many_labels_and_no_more_where_there_are_no_rules(
    store: Store,
) -> None:
    plain_round, me = store.open_round("plain", ITEMS, overlap=2), store.annotator("ann")
    round_id = store.open_round("r", ITEMS, overlap=2, checks=CHECKS, rules=Rules(repeats=0.1, at_most=50))
    without = [statements(store, plain_round, me) for _ in range(40)]
    with_rules = [statements(store, round_id, me) for _ in range(40)]
    usual = 12 if store.url.startswith("sqlite") else 13
    more = usual - 12  # of tasks with several slots PostgreSQL is asked for one at a time
    assert set(without) == {usual}
    assert min(with_rules) == usual + 3 + more  # the parts of the round, and how much there was of each
    assert max(with_rules) <= usual + 3 + more + 7  # where a check or a repeat is handed out
