"""The label database: what it hands out, what it keeps, and that nothing is lost or counted twice."""

import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from annotate.care import check
from annotate.form import Answers
from annotate.queue import Past, Shown
from annotate.recording import Label
from annotate.records import DataError, Item, Message, prompt_id
from annotate.store import Store


def item(number: int, replies: tuple[str, ...] = ("first", "second")) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    texts = [f"{reply} {number}" for reply in replies]
    return Item(id=prompt_id(prompt), split="train", use="preference", prompt=prompt, completions=texts)


ITEMS = [item(n) for n in range(30)]
TASKS = {i.task: i for i in ITEMS}
SLOT = "insert into slots(task_id, round_id, number, priority, active, state, lease) values "
JUDGEMENT = "insert into judgements(slot_id, lease, annotator_id, rev, token, preference, at) values "


@pytest.fixture
def url(fresh: Callable[[], str]) -> str:
    return fresh()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def label(view: Shown, preference: int | None = 2, attempt: str = "0") -> Label:
    return Label(token=f"{view.key}-{attempt}", preference=preference)


def counts(store: Store, query: str) -> int:
    with store.connection() as x:
        return int(x.execute(text(query)).scalar_one())


def test_a_label_is_stored_in_canonical_order_whatever_was_shown(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS), store.annotator("ann")
    _, views = store.step(round_id, me, want=30)
    assert {view.completions[0].split()[0] for view in views} == {"first", "second"}  # both orders occur

    store.step(round_id, me, [label(v, 3 if v.completions[0].startswith("first") else -3) for v in views])
    found = store.labels(round_id)
    assert [current.preference for current in found] == [3] * 30
    for current in found:
        shown = next(v for v in views if v.task == current.task).completions
        assert [TASKS[current.task].completions[i] for i in current.order] == shown


def test_views_hold_the_prompt_and_completions_and_asking_again_changes_nothing(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS), store.annotator("ann")
    _, views = store.step(round_id, me, want=3)
    assert len(views) == 3
    for view in views:
        assert view.messages == [m.model_dump() for m in TASKS[view.task].prompt]
        assert sorted(view.completions) == sorted(TASKS[view.task].completions)
    assert store.step(round_id, me, want=3)[1] == views
    assert Store(store.url).step(round_id, me, want=3)[1] == views


def test_the_order_shown_differs_between_people_and_not_between_visits(store: Store) -> None:
    round_id = store.open_round("r", ITEMS, overlap=2)
    seen = [
        {view.task: view.completions for view in store.step(round_id, store.annotator(who), want=30)[1]}
        for who in ("ann", "bob")
    ]
    assert seen[0].keys() == seen[1].keys()
    assert 5 < sum(seen[0][task] != seen[1][task] for task in TASKS) < 25


def test_a_retry_is_saved_once_and_a_correction_adds_a_revision(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS), store.annotator("ann")
    _, [view] = store.step(round_id, me, want=1)
    assert store.step(round_id, me, [label(view, 1)])[0] == ["saved"]
    assert store.step(round_id, me, [label(view, -2)])[0] == ["duplicate"]
    assert store.step(round_id, me, [label(view, -2, "b"), label(view, None, "c")])[0] == ["saved"] * 2
    assert [(past.shown.key, past.preference) for past in store.history(round_id, me)] == [(view.key, None)]
    assert [current.preference for current in store.labels(round_id)] == [None]
    assert counts(store, "select count(*) from judgements") == 3
    assert store.progress(round_id).done == 1


def test_history_comes_oldest_first_in_the_order_shown(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS), store.annotator("ann")
    _, views = store.step(round_id, me, want=5)
    for preference, view in enumerate(views, -2):
        store.step(round_id, me, [label(view, preference)])
    store.step(round_id, me, [label(views[0], 3, "again")])
    past = [Past(view, said, False, Answers()) for view, said in zip(views, [3, -1, 0, 1, 2], strict=True)]
    assert store.history(round_id, me) == past
    assert store.history(round_id, me, limit=2) == past[3:]


def test_both_bad_and_the_guidelines_read_are_kept_with_the_label(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS), store.annotator("ann")
    sha = store.guidelines("Prefer the truth.")
    assert store.guidelines("Prefer the truth.") == sha != store.guidelines("Prefer the kind.")
    _, views = store.step(round_id, me, want=2)
    unknown = {"guidelines": "0" * 16, "preference": 0}
    labels = [Label(token=f"{views[0].key}-0", preference=0, both_bad=True, guidelines=sha)]
    assert (
        store.step(round_id, me, [*labels, Label(token=f"{views[1].key}-0", **unknown)])[0] == ["saved"] * 2
    )
    assert [past.both_bad for past in store.history(round_id, me)] == [True, False]
    assert counts(store, f"select count(*) from judgements where guidelines = '{sha}' and both_bad") == 1
    assert counts(store, "select count(*) from judgements where guidelines is null") == 1


def test_texts_are_given_only_to_those_who_hold_the_task(store: Store) -> None:
    round_id, other = store.open_round("r", ITEMS[:3]), store.open_round("s", ITEMS[:3])
    ann, bob = store.annotator("ann"), store.annotator("bob")
    _, views = store.step(round_id, ann, want=2)
    keys = [view.key for view in views]
    assert sorted(view.key for view in store.held(round_id, ann, keys)) == sorted(keys)
    assert store.held(round_id, ann, keys[:1]) == views[:1]
    assert store.held(round_id, bob, keys) == store.held(other, ann, keys) == []
    assert store.held(round_id, ann, [keys[0][:-1] + "9", "999-1"]) == []


def test_each_task_gets_exactly_overlap_labels_from_different_people(store: Store) -> None:
    round_id = store.open_round("r", ITEMS, overlap=2)
    for who in ("ann", "bob", "cat"):
        me = store.annotator(who)
        while views := store.step(round_id, me, want=7)[1]:
            store.step(round_id, me, [label(v) for v in views])
        done = store.progress(round_id, me)
        assert done.asked == done.done
    found = store.labels(round_id)
    assert Counter(Counter(current.task for current in found).values()) == {2: 30}
    assert len({(current.task, current.annotator) for current in found}) == 60
    assert store.progress(round_id).done == store.progress(round_id).asked == 60


def test_reserved_slots_go_to_the_annotators_drawn_and_nobody_else(
    store: Store, fresh: Callable[[], str]
) -> None:
    names = ["ann", "bob", "cat"]
    round_id = store.open_round("r", ITEMS, overlap=1, reserve=names, salt="7", kind="simulated")
    other = Store(fresh())
    again = other.open_round("s", ITEMS[::-1], overlap=2, reserve=names[::-1], salt="7", kind="simulated")
    given = {
        n: {v.task for v in store.step(round_id, store.annotator(n, "simulated"), want=99)[1]} for n in names
    }
    assert sum(map(len, given.values())) == 30 and all(len(tasks) > 3 for tasks in given.values())
    for name in names:  # one more label for each task keeps the first assignment
        more = other.step(again, other.annotator(name, "simulated"), want=99)[1]
        assert given[name] < {view.task for view in more}
    assert store.step(round_id, store.annotator("dan", "simulated"), want=9)[1] == []


def test_work_survives_another_list_of_items(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS[:10]), store.annotator("ann")
    _, views = store.step(round_id, me, want=10)
    store.step(round_id, me, [label(v) for v in views[:4]])

    done = {v.task for v in views[:4]}
    kept = [i for i in ITEMS[:10] if i.task in done][:2]
    assert store.open_round("r", [*kept, *ITEMS[10:15]]) == round_id
    assert (store.progress(round_id).asked, store.progress(round_id).done) == (7, 2)
    assert {v.task for v in store.step(round_id, me, want=99)[1]} == {i.task for i in ITEMS[10:15]}
    assert store.step(round_id, me, [label(views[9])])[0] == ["saved"]  # shown before the list changed
    assert {current.task for current in store.labels(round_id)} == done | {views[9].task}

    store.open_round("r", ITEMS[:10], overlap=2)
    assert (store.progress(round_id).asked, store.progress(round_id).done) == (20, 5)


def with_priorities(priorities: dict[int, float]) -> list[Item]:
    return [i.model_copy(update={"priority": priorities.get(n)}) for n, i in enumerate(ITEMS)]


def order(store: Store, round_id: int, who: str) -> list[int]:
    """Numbers of the items in the order in which `who` gets them, four at a time."""
    me, got = store.annotator(who), []
    while views := store.step(round_id, me, want=4)[1]:
        got.append(ITEMS.index(TASKS[views[0].task]))
        store.step(round_id, me, [label(views[0])])
    return got


def test_high_priority_is_served_first_and_the_draw_decides_the_rest(store: Store) -> None:
    plain = order(store, store.open_round("plain", ITEMS, salt="7"), "ann")
    given = {3: -0.5, 4: 8.0, 5: -0.5, 6: 1e300, 7: 8.0}
    mixed = order(store, store.open_round("r", with_priorities(given), salt="7"), "ann")
    drawn = [n for n in plain if n not in given]
    ties = [[n for n in plain if given.get(n) == value] for value in (1e300, 8.0, -0.5)]
    assert mixed == [*ties[0], *ties[1], *ties[2], *drawn]


def test_reopening_with_other_priorities_moves_what_is_not_labelled(store: Store) -> None:
    round_id, ann, bob = store.open_round("r", ITEMS), store.annotator("ann"), store.annotator("bob")
    done, held = (store.step(round_id, who, want=1)[1][0] for who in (ann, bob))
    store.step(round_id, ann, [label(done)])
    before = counts(store, "select count(*) from slots where priority >= 1")
    store.open_round("r", with_priorities({n: n + 1.0 for n in range(30)}))
    after = counts(store, "select count(*) from slots where priority >= 1")
    assert (before, after) == (0, 29)  # not the one that is done
    skip = [ITEMS.index(TASKS[view.task]) for view in (done, held)]
    assert order(store, round_id, "ann") == [n for n in range(29, -1, -1) if n not in skip]
    assert store.step(round_id, bob, want=1)[1] == [held]
    store.open_round("r", ITEMS)  # back to the draw
    assert counts(store, "select count(*) from slots where priority >= 1 and state <> 'done'") == 0


def test_an_expired_lease_is_taken_over_and_the_late_label_is_kept_uncounted(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:1], lease=0.01)
    ann, bob = store.annotator("ann"), store.annotator("bob")
    _, [first] = store.step(round_id, ann, want=1)
    time.sleep(0.02)
    _, [second] = store.step(round_id, bob, want=1)
    assert (first.task, first.key) == (second.task, second.key.replace("-2", "-1"))
    assert store.step(round_id, bob, [label(second, 1)])[0] == ["saved"]
    assert store.step(round_id, ann, [label(first, -3)])[0] == ["late"]
    assert store.step(round_id, ann, [label(first, -3)])[0] == ["duplicate"]
    assert [(c.annotator, c.task) for c in store.labels(round_id)] == [("bob", first.task)]
    assert counts(store, "select count(*) from judgements where rev is null") == 1


def test_an_expired_lease_that_nobody_wanted_still_counts(store: Store) -> None:
    round_id, me = store.open_round("r", ITEMS[:1], lease=0.01), store.annotator("ann")
    _, [view] = store.step(round_id, me, want=1)
    time.sleep(0.02)
    assert store.step(round_id, me, [label(view)])[0] == ["saved"]


def test_the_same_person_taking_a_task_back_gets_another_token(store: Store) -> None:
    round_id = store.open_round("r", ITEMS[:1], lease=0.01)
    ann, bob = store.annotator("ann"), store.annotator("bob")
    keys = []
    for who in (ann, bob, ann):
        keys.append(store.step(round_id, who, want=1)[1][0].key)
        time.sleep(0.02)
    assert keys == ["1-1", "1-2", "1-3"]
    stale = Label(token="1-1-x", preference=1)
    assert store.step(round_id, ann, [stale])[0] == ["late"]


def test_tokens_of_others_are_refused_and_those_of_another_round_kept_there(store: Store) -> None:
    round_id, other = store.open_round("r", ITEMS[:3]), store.open_round("s", ITEMS[:3])
    ann, bob = store.annotator("ann"), store.annotator("bob")
    _, views = store.step(round_id, ann, want=3)
    assert store.step(round_id, bob, [label(views[0])])[0] == ["refused"]
    assert store.step(other, ann, [label(views[0])])[0] == [
        "saved"
    ]  # the page was open before `other` was served
    assert len(store.labels(round_id)) == 1 and not store.labels(other)
    never = Label(token="999-1-0", preference=1)
    assert store.step(round_id, ann, [never, label(views[1])])[0] == ["refused", "saved"]


@pytest.mark.parametrize(
    "bad",
    [
        {"token": "1-1-0", "preference": 4},
        {"token": "1-1-0", "preference": -4},
        {"token": "1-1-0", "preference": 1.5},
        {"token": "1-1-0", "preference": True},
        {"token": "1-1-0", "preference": "2"},
        {"token": "1-1-0"},
        {"token": "1-1", "preference": 1},
        {"token": "1-1-0; drop table judgements", "preference": 1},
        {"token": "1-1-0\n", "preference": 1},
        {"token": "1-1-0", "preference": 1, "client_ms": -1},
        {"token": "1-1-0", "preference": 1, "both_bad": True},
        {"token": "1-1-0", "preference": None, "both_bad": True},
        {"token": "1-1-0", "preference": 1, "guidelines": "x" * 16},
        {"token": "1-1-0", "preference": 1, "annotator": "bob"},
    ],
)
def test_a_label_out_of_form_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Label.model_validate(bad)


@pytest.mark.parametrize(
    "statement",
    [
        "update judgements set preference = 3",
        "delete from judgements",
        "update views set annotator_id = 2",
        "delete from views",
        "update slots set annotator_id = 2 where state = 'done'",
        "update slots set state = 'free', annotator_id = null where state = 'done'",
        "update slots set state = 'free' where state = 'open'",
        "delete from slots",
        SLOT + "(1, 1, 0, 0, true, 'free', 0)",  # the task has a slot of that number
        JUDGEMENT + "(2, 1, 2, 0, 't', 1, 0)",  # bob was never shown it
        JUDGEMENT + "(1, 1, 1, 0, 't', 1, 0)",  # revision 0 is there
        JUDGEMENT + "(1, 1, 1, 1, '1-1-0', 1, 0)",  # this token was used
        JUDGEMENT + "(1, 1, 1, 1, 't', 4, 0)",  # off the scale
        JUDGEMENT.replace("at)", "both_bad, at)") + "(1, 1, 1, 1, 't', 1, true, 0)",  # both bad is a tie
        JUDGEMENT.replace("at)", "both_bad, at)") + "(1, 1, 1, 1, 't', null, true, 0)",
        JUDGEMENT.replace("at)", "guidelines, at)") + "(1, 1, 1, 1, 't', 1, 'none', 0)",
    ],
)
def test_the_schema_itself_refuses_what_must_not_happen(store: Store, statement: str) -> None:
    round_id, ann = store.open_round("r", ITEMS[:2]), store.annotator("ann")
    store.annotator("bob")
    _, views = store.step(round_id, ann, want=2)
    first = next(view for view in views if view.key == "1-1")
    store.step(round_id, ann, [label(first)])
    with pytest.raises(IntegrityError), store.transaction() as x:
        x.execute(text(statement))


def test_claims_use_the_partial_indexes(store: Store) -> None:
    from annotate.statements import EXPIRED, FREE

    store.open_round("r", ITEMS)
    sqlite = store.url.startswith("sqlite")
    for query, index in ((FREE, "slots_free"), (EXPIRED, "slots_open")):
        with store.connection() as x:
            values = {"round": 1, "me": 1, "n": 3, "now": 0.0, "but": [], "priority": 0.5, "slot": 1}
            compiled = query.params(values).compile(x, compile_kwargs={"literal_binds": True})
            if not sqlite:  # which reads so few rows without any index
                x.exec_driver_sql("set enable_seqscan = off")
            explain = "explain query plan" if sqlite else "explain"
            plan = " ".join(str(row) for row in x.exec_driver_sql(f"{explain} {compiled}"))
        assert index in plan and "TEMP B-TREE" not in plan and "Sort" not in plan, plan
        if sqlite and query is FREE:
            assert "priority<" in plan  # it starts at a place, and does not walk there


def test_what_someone_holds_is_found_among_their_own(tmp_path: Path) -> None:
    from annotate.statements import MINE

    store = Store(f"sqlite:///{tmp_path}/labels.db")
    values = {"rounds": [1], "me": 1, "n": 3}
    with store.connection() as x:
        query = MINE.params(values).compile(x, compile_kwargs={"literal_binds": True})
        plan = " ".join(str(row) for row in x.exec_driver_sql(f"explain query plan {query}"))
        prepared = str(MINE.compile(x))
    assert "slots_mine (annotator_id=? AND round_id=? AND state=?)" in plan
    assert "state = 'open'" in prepared  # a parameter would have the statement planned anew at each step


def test_a_list_made_anew_is_served_from_its_head(store: Store) -> None:
    round_id, ann = store.open_round("r", ITEMS, overlap=2), store.annotator("ann")
    for _ in range(20):
        store.step(round_id, ann, [label(store.step(round_id, ann, want=1)[1][0])])
    first = item(99).model_copy(update={"priority": 1.0})
    Store(store.url).open_round("r", [*ITEMS, first], overlap=2)  # another process
    assert [view.task for view in store.step(round_id, ann, want=1)[1]] == [first.task]


def start_and_join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def work(url: str, first: int, people: int, out: "multiprocessing.Queue[list[tuple[str, str]]]") -> None:
    """Annotators who double-click, reload and lose leases; reports every (token, status) they were told."""
    store = Store(url)
    round_id = store.round("r")
    assert round_id is not None
    told: list[tuple[str, str]] = []

    def say(me: int, what: Label) -> None:
        told.append((what.token, store.step(round_id, me, [what])[0][0]))

    def person(number: int) -> None:
        dice, me = random.Random(number), store.annotator(f"p{number}")
        while views := store.step(round_id, me, want=1)[1]:
            if dice.random() < 0.1:
                time.sleep(0.03)  # longer than the lease
            click = partial(say, me, label(views[0], dice.randint(-3, 3)))
            clicks = [threading.Thread(target=click) for _ in range(2 if dice.random() < 0.3 else 1)]
            start_and_join(clicks)

    start_and_join([threading.Thread(target=person, args=(first + n,)) for n in range(people)])
    out.put(told)


def contend(url: str, tasks: int, processes: int, people: int, overlap: int = 3, lease: float = 0.02) -> None:
    store = Store(url)
    round_id = store.open_round("r", [item(n) for n in range(tasks)], overlap=overlap, lease=lease)
    context = multiprocessing.get_context("spawn")
    out: multiprocessing.Queue[list[tuple[str, str]]] = context.Queue()
    workers = [
        context.Process(target=work, args=(url, 100 * p, people, out), daemon=True)  # ends with its parent
        for p in range(processes)
    ]
    for worker in workers:
        worker.start()
    patience = 600 + overlap * tasks / 50  # seconds: a slow machine writes 50 labels in one
    told = [entry for _ in workers for entry in out.get(timeout=patience)]
    for worker in workers:
        worker.join()

    assert set(status for _, status in told) <= {"saved", "duplicate", "late"}
    saved = Counter(token for token, status in told if status == "saved")
    assert set(saved.values()) == {1}  # a double click is saved once
    found = store.labels(round_id)
    assert len(saved) == len(found) == overlap * tasks
    assert Counter(Counter(c.task for c in found).values()) == {overlap: tasks}
    assert len({(c.task, c.annotator) for c in found}) == overlap * tasks
    with store.connection() as x:
        rows = set(x.execute(text("select token from judgements where rev is not null")).scalars())
        late = set(x.execute(text("select token from judgements where rev is null")).scalars())
    assert check(url)[1] == []
    assert rows == set(saved)
    assert late == {token for token, status in told if status == "late"}


def test_two_processes_of_four_people_lose_and_double_nothing(url: str) -> None:
    contend(url, tasks=60, processes=2, people=4)


def test_fifty_people_label_two_hundred_tasks_each(tmp_path: Path) -> None:
    contend(f"sqlite:///{tmp_path}/labels.db", tasks=200, processes=2, people=25, overlap=50, lease=0.2)


@pytest.mark.soak
def test_fifty_people_label_ten_thousand_tasks_each(url: str) -> None:
    contend(url, tasks=10_000, processes=2, people=25, overlap=50, lease=0.2)


@pytest.mark.soak
def test_three_processes_of_sixteen_people_lose_and_double_nothing(url: str) -> None:
    contend(url, tasks=2000, processes=3, people=16)


def test_sessions_survive_and_secrets_are_not_stored(store: Store) -> None:
    me = store.annotator("ann")
    secret = store.start_session(me)
    assert Store(store.url).session(secret) == (me, "ann", "annotator")
    assert store.session(secret[:-1]) is None
    with store.connection() as x:
        assert secret not in str(x.execute(text("select * from sessions")).all())


def test_a_person_may_have_the_name_of_a_simulated_annotator(store: Store) -> None:
    assert store.annotator("ada") == store.annotator("ada") != store.annotator("ada", "simulated")


def test_names_that_cannot_be_shown_are_refused(store: Store) -> None:
    for bad in ("", " ann", "a\nb", "x" * 61, "nna\u202e", "a\u200bnn", "\ud800"):
        with pytest.raises(DataError, match="printable"):
            store.annotator(bad)


def test_a_round_is_not_reopened_for_another_purpose(store: Store) -> None:
    store.open_round("r", ITEMS, salt="0")
    with pytest.raises(DataError, match="seed"):
        store.open_round("r", ITEMS, salt="1")
    with pytest.raises(DataError, match="overlap 3"):
        store.open_round("t", ITEMS, overlap=3, reserve=["a", "b"])


def test_wrong_files_and_urls_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all, " * 100)
    with pytest.raises(DataError, match="label database"):
        Store(f"sqlite:///{tmp_path}/text.db")
    for url in ("nonsense", "postgresql://localhost/labels", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(DataError, match="sqlite:///"):
            Store(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="folder"):
        Store(f"sqlite:///{tmp_path}/file/labels.db")
