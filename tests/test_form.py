"""Forms: what they may say, what fits them, and answers between the order shown and the canonical one."""

from itertools import permutations
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from annotate.form import Answers, Edit, Form, back, fault
from annotate.recording import Label
from annotate.records import DataError, Item, Judgement, Message, prompt_id, read
from annotate.store import Store
from stages import collect
from stages.errors import SettingsError, UserError
from stages.people import fitting, load_form, round_name
from tests import tiny

FORMS = sorted(Path("configs/forms").glob("*.yaml"))
RANKING, RATING = Form(kind="ranking"), Form(kind="rating")
FULL = Form(
    attributes={"helpful": "Which helps more?", "honest": "Which is truer?"},
    flags={"unsafe": "could hurt"},
    rationale="required",
    edit=True,
)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_every_form_loads(path):
    assert load_form(str(path)).asked.endswith(("?", "."))


def test_the_forms_of_the_project_cover_every_kind():
    forms = [load_form(str(path)) for path in FORMS]
    assert {form.kind for form in forms} == {"pairwise", "ranking", "rating"}
    assert any(form.edit for form in forms) and any(form.attributes for form in forms)
    assert len({form.sha for form in forms}) == len(forms)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: pairs", "kind: Input should be 'pairwise', 'ranking' or 'rating'"),
        ("questions: [a]", "questions: Extra inputs are not permitted"),
        ("attributes: {Helpful: Which one}", "attributes.Helpful.[key]: String should match pattern"),
        ("kind: ranking\nattributes: {helpful: Which one}", "attributes: a ranking asks one question"),
        ("kind: rating\ngrades: [good]", "grades: 2 to 7 of them, not 1"),
        ("rationale: yes", "rationale: Input should be 'no', 'optional' or 'required'"),
        ("kind: [", "line 1"),
    ],
)
def test_a_wrong_form_is_one_line_with_file_and_field(tmp_path, text, said):
    path = tmp_path / "form.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_form(str(path))
    assert str(path) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_form_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match="no such form file"):
        load_form(str(tmp_path / "form.yaml"))


def test_answers_move_there_and_back_for_every_order():
    answers = Answers(
        ranking=[1, 3, 2, 2], flags={"unsafe": [0, 3]}, rationale="so", edit=Edit(of=1, text="better")
    )
    for order in permutations(range(4)):
        moved = answers.moved(order)
        assert moved.moved(back(order)) == answers
        assert moved.ranking is not None and answers.ranking is not None and moved.edit is not None
        assert [moved.ranking[order[i]] for i in range(4)] == answers.ranking
        assert moved.edit.of == order[1] and moved.flags["unsafe"] == sorted((order[0], order[3]))


def test_attributes_of_a_pair_turn_with_it_and_those_of_one_reply_stay():
    assert Answers(attributes={"helpful": 2}).moved([1, 0]).attributes == {"helpful": -2}
    assert Answers(attributes={"helpful": 2}).moved([0, 1]).attributes == {"helpful": 2}
    assert Answers(rating=4, attributes={"polite": 5}).moved([0]) == Answers(
        rating=4, attributes={"polite": 5}
    )


BOTH = {"helpful": 1, "honest": -3}


@pytest.mark.parametrize(
    ("form", "preference", "answers", "replies", "said"),
    [
        (Form(), 2, Answers(), 2, None),
        (Form(), None, Answers(), 2, None),  # skipped
        (Form(), None, Answers(ranking=[1, 2]), 2, "ranking where the form asks for a pairwise"),
        (RANKING, 1, Answers(), 2, "pairwise where the form asks for a ranking"),
        (RANKING, None, Answers(ranking=[1, 2, 2]), 3, None),
        (RANKING, None, Answers(ranking=[1, 1, 1]), 3, None),
        (RANKING, None, Answers(ranking=[1, 3, 3]), 3, "ranking [1, 3, 3] of 3 replies"),
        (RANKING, None, Answers(ranking=[1, 2]), 3, "ranking [1, 2] of 3 replies"),
        (RATING, None, Answers(rating=5), 1, None),
        (RATING, None, Answers(rating=6), 1, "an answer outside 1 to 5"),
        (FULL, 1, Answers(attributes=BOTH, rationale="so"), 2, None),
        (FULL, None, Answers(), 2, None),
        (FULL, 1, Answers(attributes={"helpful": 1}, rationale="so"), 2, "honest is not answered"),
        (FULL, 1, Answers(attributes=BOTH | {"helpful": 4}, rationale="so"), 2, "an answer outside -3 to 3"),
        (FULL, 1, Answers(attributes=BOTH, rationale="  "), 2, "the form asks for a rationale"),
        (FULL, 1, Answers(attributes=BOTH | {"kind": 1}, rationale="so"), 2, "kind is not in the form"),
        (FULL, 1, Answers(flags={"rude": [0]}), 2, "rude is not in the form"),
        (FULL, 1, Answers(attributes=BOTH, rationale="so", flags={"unsafe": [2]}), 2, "reply 3 of 2"),
        (FULL, 1, Answers(attributes=BOTH, rationale="so", edit=Edit(of=5, text="x")), 2, "reply 6 of 2"),
        (Form(), 1, Answers(edit=Edit(of=0, text="x")), 2, "the form asks for no better answer"),
        (Form(), 1, Answers(rationale="so"), 2, "the form asks for no rationale"),
    ],
)
def test_what_fits_a_form(form, preference, answers, replies, said):
    assert fault(form, preference, answers, replies) == said


def test_indices_and_lengths_are_bounded():
    for wrong in ({"of": -1, "text": "x"}, {"of": 8, "text": "x"}, {"of": 0, "text": ""}):
        with pytest.raises(ValidationError):
            Edit(**wrong)
    with pytest.raises(ValidationError):
        Answers(ranking=[0, 1])


def item(number: int, replies: int) -> Item:
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=[f"reply {i} to {number}" for i in range(replies)])


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/labels.db")
    yield store
    store.close()


def answered(store, round_id, who, form, say):
    """Everything that is open, answered by `say(shown) -> (preference, answers)`."""
    me, sha = store.annotator(who), store.form(form)
    _, views = store.step(round_id, me, want=10)
    labels = []
    for view in views:
        preference, answers = say(view)
        labels.append(Label(token=f"{view.key}-0", preference=preference, answers=answers, form=sha))
    assert store.step(round_id, me, labels)[0] == ["saved"] * len(labels)
    return me, views


def test_a_ranking_is_stored_in_canonical_order_and_shown_as_it_was_said(store):
    """Whoever ranks replies by their number says so whatever order they were shown in."""
    items = [item(n, 4) for n in range(8)]
    round_id = store.open_round("r", items)

    def by_number(view):
        ranks = [int(text.split()[1]) + 1 for text in view.completions]
        return None, Answers(ranking=[min(rank, 3) for rank in ranks], flags={})

    me, views = answered(store, round_id, "ann", RANKING, by_number)
    assert [label.answers.ranking for label in store.labels(round_id)] == [[1, 2, 3, 3]] * 8
    assert all(label.verdict for label in store.labels(round_id))
    assert len({tuple(label.order) for label in store.labels(round_id)}) > 4
    for view, past in zip(views, store.history(round_id, me), strict=True):
        assert past.answers == by_number(view)[1]


def test_a_label_that_does_not_fit_its_form_is_refused_with_the_reason_and_nothing_is_kept(store):
    round_id, me, sha = store.open_round("r", [item(0, 3)]), store.annotator("ann"), store.form(RANKING)
    _, [view] = store.step(round_id, me, want=1)
    wrong = Label(token=f"{view.key}-0", preference=None, answers=Answers(ranking=[1, 2]), form=sha)
    with pytest.raises(DataError, match=r"ranking \[1, 2\] of 3 replies"):
        store.step(round_id, me, [wrong])
    with pytest.raises(DataError, match="form 0000000000000000 is not known"):
        store.step(round_id, me, [wrong.model_copy(update={"form": "0" * 16})])
    assert store.labels(round_id) == []


def test_labels_keep_the_form_they_were_given_under(store):
    """A label written offline under the wording before is as good as it was."""
    round_id = store.open_round("r", [item(0, 2), item(1, 2)])
    for number, form in enumerate([Form(), FULL]):
        me, sha = store.annotator(f"ann{number}"), store.form(form)
        _, views = store.step(round_id, me, want=1)
        answers = Answers(attributes=BOTH, rationale="so") if form is FULL else Answers()
        store.step(round_id, me, [Label(token=f"{views[0].key}-0", preference=1, answers=answers, form=sha)])
    with store.connection() as x:
        used = x.execute(
            text("select forms.sha from judgements join forms on judgements.form = forms.sha")
        ).scalars()
        assert set(used) == {Form().sha, FULL.sha}


def test_items_must_have_as_many_replies_as_the_form_is_about(tmp_path):
    path = tiny.rows_file(tmp_path / "items.jsonl", [item(0, 3)])
    assert len(fitting(path, RANKING)) == 1
    with pytest.raises(UserError, match="3 replies, a form of kind pairwise needs 2; see the stage `sample`"):
        fitting(path, Form())
    with pytest.raises(UserError, match="3 replies, a form of kind rating needs 1"):
        fitting(path, RATING)


def collected(tmp_path, store, items, form_text, overlap, says):
    """The judgements and demonstrations that collect writes once people have labelled all."""
    form = tmp_path / "mine.yaml"
    form.write_text(form_text)
    path = tiny.rows_file(tmp_path / "items.jsonl", items)
    run = tiny.run_in(tmp_path / "run", "collect")
    round_id = store.open_round(
        round_name(run.experiment, run.stage, run.seed, str(form)), items, overlap=overlap, salt="0"
    )
    for who, say in says.items():
        answered(store, round_id, who, load_form(str(form)), say)
    settings = {"items": path, "annotators": "people", "form": str(form), "overlap": overlap}
    collect.main(collect.Config(**settings, db=store.url), run)
    return run


def test_collect_writes_rankings_that_rm_and_dpo_read_as_pairs(tmp_path, store):
    from stages.rm import in_pairs

    def rank(view):
        return None, Answers(ranking=[{"0": 1, "1": 2, "2": 2}[text.split()[1]] for text in view.completions])

    says = {"ann": rank, "bob": rank}
    run = collected(tmp_path, store, [item(n, 3) for n in range(4)], "kind: ranking", 2, says)
    rows = read(run.path / "judgements.jsonl", Judgement)
    assert [row.ranking for row in rows] == [[1, 2, 2]] * 8
    pairs = in_pairs(rows)
    assert [(p.completions[0][6], p.completions[1][6], p.preference) for p in pairs[:3]] == [
        ("0", "1", 2),
        ("0", "2", 2),
        ("1", "2", 0),
    ]
    found = run.manifest.metrics
    assert (found["verdicts"], found["agreement"], found["tie_rate"]) == (8, 1.0, pytest.approx(1 / 3))
    assert found["krippendorff_alpha"] == pytest.approx(1)


def test_collect_makes_demonstrations_and_pairs_of_better_answers(tmp_path, store):
    from annotate.records import Record

    def better(view):
        of = view.completions.index(next(t for t in view.completions if t.startswith("reply 1")))
        number = view.completions[0].split()[-1]
        text = f"my own {number}" if number != "2" else view.completions[of]  # the same is no edit
        return 0, Answers(edit=Edit(of=of, text=text))

    run = collected(tmp_path, store, [item(n, 2) for n in range(3)], "edit: true", 1, {"ann": better})
    demonstrations = read(run.path / "demonstrations.jsonl", Record)
    assert sorted(str(row.completion) for row in demonstrations) == ["my own 0", "my own 1"]
    assert {row.use for row in demonstrations} == {"sft"}
    against = [row for row in read(run.path / "judgements.jsonl", Judgement) if row.preference == 2]
    assert sorted(row.completions for row in against) == [
        ["my own 0", "reply 1 to 0"],
        ["my own 1", "reply 1 to 1"],
    ]


def test_collect_measures_how_far_grades_agree(tmp_path, store):
    def grade(view):
        return None, Answers(rating=1 + int(view.completions[0].split()[-1]), flags={"unsafe": [0]})

    form = "kind: rating\nflags: {unsafe: could hurt}"
    run = collected(tmp_path, store, [item(n, 1) for n in range(5)], form, 2, {"ann": grade, "bob": grade})
    rows = read(run.path / "judgements.jsonl", Judgement)
    assert [row.rating for row in rows] and all(row.flags == {"unsafe": [0]} for row in rows)
    assert run.manifest.metrics["krippendorff_alpha"] == pytest.approx(1)
    assert run.manifest.facts["flagged"] == {"unsafe": 10}
    assert "agreement" not in run.manifest.metrics
