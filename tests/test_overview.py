"""The numbers of the researcher's pages, worked by hand on a small round; quickly there on a large one."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import insert, select

from annotate import ledger as ledgers
from annotate.agreement import first_shown_wins, krippendorff_alpha, raw_agreement
from annotate.closeup import LONGEST, as_they_saw_them, clipped, in_drawn_order, in_words
from annotate.form import Answers, Edit, Form
from annotate.ledger import Ledger
from annotate.overview import disputed, newest, overview
from annotate.queue import Shown
from annotate.recording import Label
from annotate.schema import Judgement, Slot
from annotate.store import Store
from tests.crowd import clock, fill, judge
from tests.test_app import item

SAID: dict[str, dict[int, int | None]] = {
    "ann": {0: 3, 1: 0, 2: -1, 3: None},
    "bob": {0: 1, 1: 0, 2: 2, 3: 2},
    "cat": {0: 2, 1: 1, 2: -3, 3: -2},
}
"""Canonical preferences by number of the item. Cat then changes her last one to 2."""
MS = {"ann": [1000] * 4, "bob": [3000, 5000, 7000, 9000], "cat": [4000] * 4}


@pytest.fixture
def store(fresh: Callable[[], str]) -> Iterator[Store]:
    store = Store(fresh())
    yield store
    store.close()


def number(shown: Shown) -> int:
    return int(shown.messages[-1]["content"].split()[-1])


def canonical(shown: Shown, preference: int | None) -> int | None:
    """From canonical order to the one shown, or back."""
    return preference if preference is None or shown.completions[0].startswith("one") else -preference


def answer(name: str) -> Callable[[Shown], dict[str, Any]]:
    def of(shown: Shown) -> dict[str, Any]:
        n = number(shown)
        preference = canonical(shown, SAID[name][n])
        return {
            "preference": preference,
            "client_ms": MS[name][n],
            "reason": "too long" if preference is None else None,
        }

    return of


@pytest.fixture
def worked(store: Store) -> Store:
    """Four tasks for three people; a fourth comes too late, a label is changed."""
    now = time.time()
    round_id = store.open_round("r", [item(n) for n in range(4)], overlap=3)
    dan = store.annotator("dan")
    with clock(now - 7200):
        [slow] = store.step(round_id, dan, want=1)[1]
    judge(store, round_id, "ann", now - 3600, answer("ann"), 4)
    judge(store, round_id, "bob", now - 3000, answer("bob"), 4)
    judge(store, round_id, "cat", now - 1500, answer("cat"), 4)
    assert store.step(round_id, dan, [Label(token=f"{slow.key}-0", preference=1)])[0] == ["late"]
    cat = store.annotator("cat")
    [changed] = [past.shown for past in store.history(round_id, cat) if number(past.shown) == 3]
    again = Label(token=f"{changed.key}-b", preference=canonical(changed, 2), client_ms=100)
    assert store.step(round_id, cat, [again])[0] == ["saved"]
    return store


def test_counts_pace_and_agreement_of_a_round_worked_by_hand(worked: Store) -> None:
    found = overview(Ledger(worked, 1))
    assert (found.name, found.asked, found.done, found.in_hand) == ("r", 12, 12, 0)
    assert (found.labels, found.skipped, found.late) == (12, 1, 1)
    # pairs with the same verdict: 3 of 3, 1 of 3, 1 of 3, 1 of 1
    said = [[3, 1, 2], [0, 0, 1], [-1, 2, -3], [2, 2]]
    assert found.agreement == raw_agreement(said) and found.alpha == krippendorff_alpha(said)
    assert found.agreement is not None and found.agreement.value == pytest.approx(0.6)
    assert found.ties is not None and (found.ties.value, found.ties.n) == (pytest.approx(2 / 11), 11)
    lean = first_shown_wins([(x.task, x.preference or 0, x.order) for x in worked.labels(1)])
    assert found.first_shown is not None and lean is not None
    assert (found.first_shown.value, found.first_shown.n) == (pytest.approx(lean.value), lean.n)
    assert found.first_shown.se == pytest.approx(lean.se)
    assert found.pace is not None and sum(found.pace.bars) == 12  # a change is no new label
    assert found.pace.per_hour == pytest.approx(8) and found.pace.seconds_left == 0
    assert [(reason.name, reason.text) for reason in found.reasons] == [("ann", "too long")]
    assert found.flags == {}


def test_each_annotator_worked_by_hand(worked: Store) -> None:
    people = {person.name: person for person in overview(Ledger(worked, 1)).people}
    assert [*people] == ["ann", "bob", "cat", "dan"]
    shares = {
        name: [share and (share.count, share.n) for share in (who.skips, who.hasty, who.agreement, who.ties)]
        for name, who in people.items()
    }
    # agreement: for each task the share of the others who said the same: ann 1 + 1/2 + 1/2, of three tasks
    assert shares["ann"] == [(1, 4), (4, 4), (2, 3), (1, 3)]
    assert shares["bob"] == [(0, 4), (0, 4), (2.5, 4), (1, 4)]
    assert shares["cat"] == [(0, 4), (0, 4), (2.5, 4), (0, 4)]
    assert shares["dan"] == [None] * 4
    counts = {name: (who.labels, who.verdicts, who.late, who.seconds) for name, who in people.items()}
    assert counts["ann"] == (4, 3, 0, 1.0) and counts["bob"] == (4, 4, 0, 6.0)
    assert counts["cat"] == (4, 4, 0, 4.0) and counts["dan"] == (0, 0, 1, None)


def test_tasks_on_which_people_differ_come_with_who_said_what(worked: Store) -> None:
    ledger = Ledger(worked, 1)
    # mean distance of two labels: 10/3 on task 2, 4/3 on 0, 2/3 on 1, 0 on 3
    cards = in_drawn_order(ledger, disputed(ledger, 9))
    assert [card.messages[-1]["content"] for card in cards] == [f"question {n}" for n in (2, 0, 1)]
    first, second = ("A", "B") if cards[0].replies[0] == "one 2" else ("B", "A")
    assert [(each.name, each.verdict) for each in cards[0].opinions] == [
        ("ann", f"{second} is slightly better"),
        ("bob", f"{first} is better"),
        ("cat", f"{second} is much better"),
    ]


def test_the_labels_of_one_annotator_stand_as_they_saw_them(worked: Store) -> None:
    ledger, ann = Ledger(worked, 1), worked.annotator("ann")
    cards = as_they_saw_them(ledger, ann, newest(ledger, ann, 3))
    shown = {past.shown.messages[-1]["content"]: past.shown for past in worked.history(1, ann)}
    assert [card.messages[-1]["content"] for card in cards] == [*shown][::-1][:3]
    for card in cards:
        assert card.replies == shown[card.messages[-1]["content"]].completions
        assert [each.name for each in card.opinions] == ["ann", "bob", "cat"]
    [skip] = [
        card for card in as_they_saw_them(ledger, ann, newest(ledger, ann, 9)) if "3" in card.replies[0]
    ]
    assert skip.opinions[0].verdict == "skipped: too long" and skip.opinions[0].seconds == 1.0
    assert as_they_saw_them(ledger, worked.annotator("dan"), [1, 2, 3, 4]) == []


def test_who_stands_out_is_marked_with_the_reason(store: Store) -> None:
    round_id = store.open_round("r", [item(n) for n in range(60)], overlap=3)
    now = time.time()

    def sound(shown: Shown) -> dict[str, Any]:
        return {"preference": canonical(shown, 2 - 4 * (number(shown) % 2)), "client_ms": 8000}

    def hasty(shown: Shown) -> dict[str, Any]:
        return {"preference": 1, "client_ms": 900}

    for name, how in (("ann", sound), ("bob", sound), ("fox", hasty)):
        judge(store, round_id, name, now - 600, how, 60)
    people = {person.name: person.marks for person in overview(Ledger(store, round_id)).people}
    assert people["ann"] == people["bob"] == {}
    assert people["fox"].keys() == {"hasty", "first_shown", "agreement"}
    assert people["fox"]["hasty"] == "100% of the labels in under 2 s"
    assert people["fox"]["first_shown"] == "prefers the reply shown first in 100%"
    assert people["fox"]["agreement"].startswith("agrees with others in ")


def test_a_round_without_labels_has_an_overview(store: Store) -> None:
    found = overview(Ledger(store, store.open_round("r", [item(0)])))
    assert (found.asked, found.done, found.people, found.pace, found.alpha) == (1, 0, [], None, None)
    assert disputed(Ledger(store, 1), 5) == newest(Ledger(store, 1), 1, 5) == []


def test_reading_on_finds_the_same_as_reading_anew(worked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "SETTLED", 1000.0)
    ledger = Ledger(worked, 1)
    ledger.read()
    assert 0 < len(ledger._settled) < 14  # what is older than the last label by cat's first hand, and no more
    other = worked.open_round("another", [item(n) for n in range(4)])
    judge(worked, other, "ann", time.time(), answer("ann"), 2)
    cat = worked.annotator("cat")
    for past in worked.history(1, cat):
        worked.step(1, cat, [Label(token=f"{past.shown.key}-again", preference=0, both_bad=True)])
    assert (ledger.read().table == Ledger(worked, 1).read().table).all()
    assert len(ledger.read().table) == 14 + 4


def test_a_judgement_that_is_seen_late_is_not_missed(store: Store) -> None:
    """A database server may give out id 5, then 9, and let 9 be seen first."""
    round_id = store.open_round("r", [item(0), item(1)])
    me, ledger = store.annotator("ann"), Ledger(store, round_id)
    store.step(round_id, me, want=2)
    for n, row_id in enumerate((9, 5)):
        with store.transaction() as x:
            slot = x.execute(select(Slot.id)).scalars().all()[n]
            row = {"slot_id": slot, "lease": 1, "annotator_id": me, "rev": 0, "token": f"{slot}-1-x"}
            x.execute(insert(Judgement), {"id": row_id, "preference": 1, "at": time.time(), **row})
        assert len(ledger.read().table) == n + 1


@pytest.mark.parametrize("kind", ["ranking", "rating"])
def test_other_forms_have_agreement_and_words(store: Store, kind: str) -> None:
    texts = ["one", "two", "three"] if kind == "ranking" else ["one"]
    items = [item(n).model_copy(update={"completions": [f"{t} {n}" for t in texts]}) for n in range(3)]
    form = Form.model_validate({"kind": kind, "flags": {"harmful": "does harm"}, "rationale": "optional"})
    sha, round_id = store.form(form), store.open_round("r", items, overlap=2)

    def of(shown: Shown, turned: bool) -> dict[str, Any]:
        n = number(shown)
        order = [shown.completions.index(f"{t} {n}") for t in texts]
        ranks = [3, 2, 1] if turned and n == 2 else [1, 2, 2]
        canonical = (
            Answers(ranking=ranks) if kind == "ranking" else Answers(rating=5 if turned and n == 2 else n + 1)
        )
        return {
            "preference": None,
            "form": sha,
            "answers": canonical.moved(order).model_copy(update={"flags": {"harmful": [0]}}),
        }

    now = time.time()
    judge(store, round_id, "ann", now - 60, lambda shown: of(shown, False), 3)
    judge(store, round_id, "bob", now - 30, lambda shown: of(shown, True), 3)
    found = overview(Ledger(store, round_id))
    assert (found.labels, found.skipped, found.flags) == (6, 0, {"harmful": 6})
    # two of three grades are the same; of nine pairs of a ranking the six of tasks 0 and 1
    assert [person.agreement and person.agreement.value for person in found.people] == pytest.approx(
        [2 / 3] * 2
    )
    if kind == "rating":
        assert found.agreement is None and found.alpha == krippendorff_alpha([[-3, -3], [-2, -2], [-1, 1]])
    else:
        assert found.agreement is not None and found.agreement.value == pytest.approx(6 / 9)
    ledger = Ledger(store, round_id)
    [card] = in_drawn_order(ledger, disputed(ledger, 9))
    assert card.messages[-1]["content"] == "question 2"
    assert all("flagged harmful: " in each.more[0] for each in card.opinions)


@pytest.mark.parametrize("kind", ["pairwise", "rating"])
def test_agreement_on_each_attribute(store: Store, kind: Any) -> None:
    from annotate.researcher import attributes

    form = Form(kind=kind, attributes={"helpful": "Which?", "honest": "Which?"})
    replies = ["one", "two"] if kind == "pairwise" else ["one"]
    items = [item(n).model_copy(update={"completions": [f"{r} {n}" for r in replies]}) for n in range(3)]
    round_id = store.open_round("r", items, overlap=2)
    sha, said = store.form(form), {"ann": [(1, 3), (2, 2), (3, 1)], "bob": [(1, 1), (3, 2), (1, 3)]}

    def of(who: str) -> Callable[[Shown], dict[str, Any]]:
        def label(shown: Shown) -> dict[str, Any]:
            values = dict(zip(form.attributes, said[who][number(shown)], strict=True))
            if kind == "rating":
                return {"preference": None, "form": sha, "answers": Answers(rating=3, attributes=values)}
            shown_so = {name: canonical(shown, value - 2) or 0 for name, value in values.items()}
            return {"preference": 0, "form": sha, "answers": Answers(attributes=shown_so)}

        return label

    for who in said:
        judge(store, round_id, who, time.time() - 60, of(who), 3)
    found = overview(Ledger(store, round_id))
    each = {"helpful": [[1, 1], [2, 3], [3, 1]], "honest": [[3, 1], [2, 2], [1, 3]]}
    shift = 4 if kind == "rating" else 2
    for name, values in each.items():
        ratings = [[value - shift for value in task] for task in values]
        raw = None if kind == "rating" else raw_agreement(ratings)
        assert found.attributes[name] == (raw, krippendorff_alpha(ratings))
    [_, (name, raw_share, alpha)] = attributes(found)
    assert name == "honest" and alpha.startswith(f"{found.attributes['honest'][1].value:.2f} (")
    assert raw_share.startswith("33%") if kind == "pairwise" else raw_share == ""


def test_answers_in_words() -> None:
    assert in_words(Form(), 3, Answers()) == "A is much better"
    assert in_words(Form(), -1, Answers()) == "B is slightly better"
    assert in_words(Form(), None, Answers()) == "skipped"
    assert in_words(Form(kind="ranking"), None, Answers(ranking=[2, 1, 2])) == "B, then A = C"
    assert in_words(Form(kind="rating"), None, Answers(rating=4)) == "good (4 of 5)"
    assert clipped("x" * (LONGEST + 1200)).endswith("xx … (1,200 characters more)")


def test_all_that_was_answered_is_told(store: Store) -> None:
    form = Form(attributes={"honest": "Which?"}, flags={"harmful": "x"}, rationale="optional", edit=True)
    sha, round_id = store.form(form), store.open_round("r", [item(0)])
    said = Answers(
        attributes={"honest": -2}, flags={"harmful": [1]}, rationale="why", edit=Edit(of=0, text="better")
    )
    judge(
        store,
        round_id,
        "ann",
        time.time(),
        lambda _: {"preference": 0, "both_bad": True, "form": sha, "answers": said},
    )
    ledger, ann = Ledger(store, round_id), store.annotator("ann")
    [card] = as_they_saw_them(ledger, ann, newest(ledger, ann, 5))
    [told] = card.opinions
    assert told.verdict == "tie: both bad"
    assert told.more == ["honest: B is better", "flagged harmful: B", "because: why", "a better A: better"]


def test_a_hundred_thousand_labels_of_fifty_people_are_looked_at_in_a_second(store: Store) -> None:
    from annotate.researcher import COLUMNS, TEMPLATES, attributes, facts

    round_id = fill(store, item(0), [f"person {n}" for n in range(50)], 2000)
    ledger = Ledger(store, round_id)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        found = overview(ledger)
        template = TEMPLATES.get_template("round.html")
        shown = {"facts": facts(found), "attributes": attributes(found)}
        template.render(title="t", who=None, now=0, it=found, columns=COLUMNS, state="open", **shown)
        took.append(time.perf_counter() - start)
    assert found.labels == 100_000 and len(found.people) == 50
    assert {person.labels for person in found.people} == {2000}
    print("first, later:", *(f"{seconds:.2f} s" for seconds in took))
    assert took[0] < 10 and min(took) < 2  # on a busy machine; a quarter of that on a quiet one
