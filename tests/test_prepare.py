"""Raw rows of every shape become prompts and replies; every row is accounted for; uses do not overlap."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from annotate.records import DataError, Message, prompt_id
from stages import datacard
from stages.importers import Dropped, Example, paired, read
from stages.prepare import Config, Prepared, from_files, from_helpdesk
from stages.turns import Turn, Unusable, split_turns, split_words, transcript

QUESTION = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]
BLACK = [{"role": "assistant", "content": "Black."}]
ASKED = (Message(role="user", content="What colour is the sky?"),)


@pytest.fixture
def file(tmp_path: Path):
    """Writes rows (objects, or lines as they stand) to a JSON-lines file and returns its path."""

    def file(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        data = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return str(path)

    return file


def only(path: str) -> Example | Dropped:
    [(number, found)] = read(path)
    assert number == 1
    return found


# Shapes


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "What colour is the sky?", "chosen": " Blue.", "rejected": " Black."}, "Blue.", "Black."),
        ({"prompt": QUESTION, "chosen": BLUE, "rejected": BLACK}, "Blue.", "Black."),
        ({"chosen": QUESTION + BLUE, "rejected": QUESTION + BLACK}, "Blue.", "Black."),
        ({"prompt": "sky", "chosen": QUESTION + BLUE, "rejected": QUESTION + BLACK}, "Blue.", "Black."),
        (
            {"chosen": "What colour is the sky? Blue.", "rejected": "What colour is the sky? Black."},
            "Blue.",
            "Black.",
        ),
        (
            {
                "chosen": "\n\nHuman: What colour is the sky?\n\nAssistant: Blue.",
                "rejected": "\n\nHuman: What colour is the sky?\n\nAssistant: Black.",
            },
            "Blue.",
            "Black.",
        ),
        ({"prompt": "What colour is the sky?", "completion": "Blue."}, "Blue.", None),
        ({"prompt": QUESTION, "completion": BLUE}, "Blue.", None),
        (
            {"prompt": "\n\nHuman: What colour is the sky?\n\nAssistant:", "completion": "Blue."},
            "Blue.",
            None,
        ),
        ({"messages": QUESTION + BLUE}, "Blue.", None),
        ({"prompt": "What colour is the sky?", "completion": "Blue.", "label": True}, "Blue.", None),
        ({"prompt": QUESTION, "completion": BLACK, "label": False}, None, "Black."),
        ({"messages": QUESTION + BLACK, "label": False}, None, "Black."),
        ({"prompt": "What colour is the sky?"}, None, None),
        ({"prompt": QUESTION}, None, None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_reads_every_shape_in_words_and_in_messages(file, row, chosen, rejected):
    found = only(file(row))
    assert isinstance(found, Example)
    assert (found.prompt, found.chosen, found.rejected) == (ASKED, chosen, rejected)
    assert found.labelled == ("label" in row)


def test_reads_plain_text_and_compressed_files(file):
    assert only(file({"text": " The sky is blue. "}, name="a.jsonl.gz")) == Example(text="The sky is blue.")


def test_a_system_message_and_earlier_turns_stay_in_the_prompt(file):
    system = {"role": "system", "content": "Be brief."}
    found = only(file({"messages": [system, *QUESTION, *BLUE, *QUESTION, *BLACK]}))
    assert [m.role for m in found.prompt] == ["system", "user", "assistant", "user"]
    assert found.chosen == "Black."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": QUESTION, "completion": ""}, "empty reply"),
        ({"prompt": " ", "completion": "Blue."}, "empty turn in the prompt"),
        ({"prompt": QUESTION, "chosen": "Blue. ", "rejected": "Blue."}, "chosen and rejected are the same"),
        ({"chosen": QUESTION + BLUE, "rejected": QUESTION + BLUE}, "chosen and rejected are the same"),
        (
            {"chosen": "Blue.", "rejected": "Black."},
            "no common prompt: the sides differ from their first word",
        ),
        (
            {"chosen": QUESTION + BLUE, "rejected": QUESTION + BLACK + QUESTION + BLUE},
            "no common prompt: the sides differ before their last turn",
        ),
        ({"chosen": QUESTION + BLUE, "rejected": "Black."}, "one side is a text, the other a conversation"),
        ({"messages": QUESTION}, "the prompt does not end with the user's turn"),
        ({"messages": BLUE}, "the prompt does not end with the user's turn"),
        ({"messages": QUESTION + QUESTION + BLUE}, "the turns of user and assistant do not alternate"),
        ({"prompt": QUESTION, "completion": QUESTION}, "the reply is not one turn of the assistant"),
        ({"messages": [{"role": "tool", "content": "4"}, *QUESTION, *BLUE]}, "unknown role tool"),
        ({"text": "\n"}, "empty text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_drops_what_cannot_be_used_and_says_why(file, row, reason):
    assert only(file(row)) == Dropped(reason)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (['{"prompt": "a"'], "row 1, the whole row: Invalid JSON"),
        ([{"text": "\ud83d"}], "row 1, the whole row: Invalid JSON"),
        (['{"text": "a"}', "", "[1]"], "row 3, the whole row"),
        (['[{"prompt": "a"}]'], "one JSON array"),
        ([{"question": "a", "answer": "b"}], "row 1: has the columns answer, question; needs"),
        ([{"prompt": "a", "chosen": "b"}], "row 1: `chosen` does not go with prompt"),
        (
            [{"prompt": "a", "completoin": "b"}],
            "row 1: unknown column `completoin`; did you mean `completion`",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "row 2, completion: missing or null"),
        ([{"prompt": "a", "completion": None}], "row 1, completion: missing or null"),
        ([{"prompt": "a", "completion": 7}], "row 1, completion: .*expected a text, or a list of messages"),
        ([{"messages": [{"role": "user", "content": [1]}]}], "row 1, messages: .*expected a text, or a list"),
        ([{"messages": ["hello"]}], "row 1, messages"),
        ([{"prompt": "a", "completion": "b", "label": "yes"}], "row 1, label: 'yes'; write true"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "label": True}],
            "row 2: `label`",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_cannot_be_read_naming_file_row_and_column(file, rows, problem):
    path = file(*rows)
    with pytest.raises(DataError, match=problem) as error:
        list(read(path))
    assert path in str(error.value) and "\n" not in str(error.value)


def test_refuses_missing_and_broken_files(tmp_path, file):
    with pytest.raises(DataError, match="no such file"):
        list(read(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read(tmp_path))
    whole = Path(file({"text": "a " * 5000}, name="cut.jsonl.gz"))
    whole.write_bytes(whole.read_bytes()[:-12])
    with pytest.raises(DataError, match="is the file complete"):
        list(read(whole))


# Where the prompt ends

WORD = st.text("abcé\u2019-", min_size=1, max_size=5)
SAID = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
SPACE = st.sampled_from([" ", "  ", "\n", "\n\n"])


@st.composite
def conversations(draw) -> list[Turn]:
    pairs = draw(st.lists(st.tuples(SAID, SAID), max_size=3))
    turns = [turn for asked, told in pairs for turn in (Turn("user", asked), Turn("assistant", told))]
    return [*turns, Turn("user", draw(SAID))]


def as_transcript(turns: list[Turn]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)


@given(conversations(), SAID, SAID)
def test_a_transcript_is_split_at_the_last_common_turn_of_the_assistant(prompt, chosen, rejected):
    sides = [transcript(as_transcript([*prompt, Turn("assistant", reply)])) for reply in (chosen, rejected)]
    if chosen == rejected:
        return
    assert split_turns(*sides) == (prompt, chosen, rejected)


@given(conversations(), conversations())
def test_the_prompt_is_made_of_whole_turns_that_both_sides_share(one, other):
    chosen, rejected = [*one, Turn("assistant", "yes")], [*other, Turn("assistant", "no")]
    try:
        prompt, yes, no = split_turns(chosen, rejected)
    except Unusable:
        assert one != other
        return
    assert prompt == chosen[: len(prompt)] == rejected[: len(prompt)]
    assert [*prompt, Turn("assistant", yes)] == chosen and [*prompt, Turn("assistant", no)] == rejected


@given(st.lists(st.tuples(WORD, SPACE)), st.lists(st.tuples(WORD, SPACE)), st.lists(st.tuples(WORD, SPACE)))
def test_texts_are_never_split_inside_a_word(common, rest, other_rest):
    chosen, rejected = ("".join(a + b for a, b in [*common, *tail]) for tail in (rest, other_rest))
    if chosen == rejected:
        return
    try:
        prompt, yes, no = split_words(chosen, rejected)
    except Unusable:
        first = [side.split()[:1] for side in (chosen, rejected)]
        assert first[0] != first[1] or min(len(chosen.split()), len(rejected.split())) <= 1
        return
    assert prompt + yes == chosen and prompt + no == rejected
    assert prompt[-1].isspace()
    assert prompt.split() == chosen.split()[: len(prompt.split())] == rejected.split()[: len(prompt.split())]


def test_a_word_that_begins_alike_belongs_to_the_replies():
    assert split_words("The sky is blue.", "The sky is black.") == ("The sky is ", "blue.", "black.")


def test_only_paragraphs_open_a_turn():
    text = "\n\nHuman: Say 'Assistant: hi'.\n\nAssistant: hi\nHuman: no turn\n\nAnd so on."
    assert [turn.role for turn in transcript(text)] == ["user", "assistant"]
    assert transcript("An essay.\n\nHuman: nature") is None


# Splits, uses and what they promise


def preferences(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(count)
    ]


def prepare(*paths: str, **settings: object) -> Prepared:
    return from_files(Config(data=list(paths), **settings), paths)


def accounted(prepared: Prepared) -> dict[str, int]:
    card = datacard.account(prepared.read, prepared.dropped)
    rows = [row for reason in card["reasons"] for numbers in reason["rows"].values() for row in numbers]
    assert len(rows) == card["dropped"] == card["read"] - card["kept"]
    return {reason["reason"]: reason["count"] for reason in card["reasons"]}


def test_training_sees_no_prompt_in_two_uses(file):
    prepared = prepare(file(*preferences(400)))
    records, judgements = prepared.records.values(), prepared.judgements
    assert len(records) == len({r.id for r in records}) == 400
    assert {r.completion is not None for r in records if r.use == "sft"} == {True}
    assert {r.completion for r in records if r.use != "sft"} == {None}
    assert {j.use for j in judgements if j.split == "train"} == {"preference"}
    held_out = {r.id for r in records if r.split != "train"}
    assert held_out == {j.id for j in judgements if j.split != "train"}
    assert set(Counter(j.use for j in judgements if j.split == "test")) == {"sft", "preference", "policy"}


def test_shares_are_drawn_as_asked(file):
    shares = {"sft": 0.5, "preference": 0.5, "policy": 0.0}
    prepared = prepare(file(*preferences(2000)), split={"test": 0.25}, use=shares)
    splits = Counter(r.split for r in prepared.records.values())
    uses = Counter(r.use for r in prepared.records.values())
    assert set(splits) == {"train", "test"} and set(uses) == {"sft", "preference"}
    assert abs(splits["test"] - 500) < 80 and abs(uses["sft"] - 1000) < 90  # 4 standard deviations


def test_split_and_use_stay_when_rows_are_added_or_reordered(file):
    rows = preferences(200)
    few = prepare(file(*rows[:100], name="few.jsonl")).records
    many = prepare(file(*reversed(rows), name="many.jsonl")).records
    assert all((few[id].split, few[id].use) == (many[id].split, many[id].use) for id in few)


def test_a_conversation_stays_in_the_split_of_its_opening(file):
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, *BLUE, *QUESTION * n, *BLUE]}
        for i in range(100)
        for n in (1,)
    ] + [{"messages": [{"role": "user", "content": f"Question {i}?"}, *BLUE]} for i in range(100)]
    drawn: dict[str, set[tuple[str, str]]] = {}
    for record in prepare(file(*rows)).records.values():
        drawn.setdefault(record.prompt[0].content, set()).add((record.split, record.use))
    assert len(drawn) == 100 and all(len(both) == 1 for both in drawn.values())
    assert len(set.union(*drawn.values())) > 4


def test_the_place_of_the_preferred_reply_carries_nothing(file):
    judgements = prepare(file(*preferences(1000))).judgements
    first = sum(j.preference == 1 for j in judgements)
    assert abs(first - len(judgements) / 2) < 2 * len(judgements) ** 0.5
    assert all(j.completions[0 if j.preference == 1 else 1].startswith("Good") for j in judgements)
    assert {(j.kind, j.preference) for j in judgements} == {("person", 1), ("person", -1)}


def test_liked_and_disliked_replies_to_one_prompt_become_a_comparison(file):
    def row(prompt: str, completion: str, label: bool) -> dict[str, object]:
        return {"prompt": prompt, "completion": completion, "label": label}

    path = file(
        row("p", "bad", False), row("q", "fine", True), row("p", "good", True), row("p", "well", True)
    )
    examples = [(("rows", number), found) for number, found in read(path) if isinstance(found, Example)]
    found = [([row for _, row in places], e.chosen, e.rejected) for places, e in paired(examples)]
    assert found == [([1, 3], "good", "bad"), ([2], "fine", None), ([4], "well", None)]


def test_every_row_is_kept_or_dropped_with_a_reason(file):
    rows = [*preferences(50), *preferences(3), {"prompt": "a", "chosen": "", "rejected": "b"}]
    rows += [{"prompt": "Question 7?", "chosen": f"Another {i}.", "rejected": "Bad."} for i in range(20)]
    rows += [{"prompt": "Long " * 30, "chosen": "a", "rejected": "b"}]
    prepared = prepare(file(*rows), max_words=20)
    reasons = accounted(prepared)
    assert prepared.read == 75
    assert reasons["exact duplicate of an earlier row"] == 3
    assert reasons["empty reply"] == reasons["more than 20 words"] == 1
    known = prepared.records[prompt_id([Message(role="user", content="Question 7?")])]
    more = reasons.get("its prompt is there already, and its replies have no use", 0)
    judged = sum(j.id == known.id for j in prepared.judgements)
    assert (more, judged) == ((20, 0) if known.split == "train" and known.use != "preference" else (0, 21))


def test_duplicates_are_found_across_files_and_places_name_the_file(file):
    paths = [file(*preferences(5), name="a.jsonl"), file(*preferences(6), name="b.jsonl")]
    assert accounted(prepared := prepare(*paths)) == {"exact duplicate of an earlier row": 5}
    assert prepared.dropped["exact duplicate of an earlier row"] == [("b.jsonl", n) for n in range(1, 6)]
    assert datacard.names(["x/train.jsonl", "y/train.jsonl", "z.jsonl"]) == [
        "x/train.jsonl",
        "y/train.jsonl",
        "z.jsonl",
    ]


def test_reads_no_more_rows_than_asked(file):
    assert prepare(file(*preferences(9)), rows=4).read == 4


def test_the_corpus_holds_the_training_split_without_verdicts(file):
    prepared = prepare(file(*preferences(300)))
    train = {r.prompt[0].content for r in prepared.records.values() if r.split == "train"}
    text = "\n\n".join(prepared.corpus)
    assert set(re.findall(r"Question \d+\?", text)) == train
    assert text.count("Good") == text.count("Bad") == len(train)
    first = sum("Good" in document for document in prepared.corpus if "Question" in document)
    assert abs(first - len(train) / 2) < 2 * len(train) ** 0.5


def test_documents_hold_no_blank_line(file):
    prepared = prepare(file({"text": "One.\n\n\u2028Two.\r\n\r\nThree."}))
    assert prepared.corpus == ["One.\nTwo.\nThree."]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"split": {"test": 0.6, "validation": 0.4}}, "leave some to train"),
        ({"use": {"sft": 0.5, "policy": 0.4}}, "add up to 0.9, not 1"),
        ({"split": {"dev": 0.1}}, "split"),
        ({"rows": 0}, "rows"),
    ],
)
def test_refuses_shares_that_do_not_add_up(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        Config(**settings)


# The data card


def test_the_card_counts_what_was_written(file):
    prepared = prepare(file(*preferences(60)))
    records = list(prepared.records.values())
    rows = datacard.account(prepared.read, {"empty reply": [("rows.jsonl", 3), ("rows.jsonl", 2)]})
    source = datacard.source(file({"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}))
    card = datacard.describe([source], rows, records, prepared.judgements, prepared.corpus)
    assert source["columns_not_read"] == ["id"] and len(source["sha256"]) == 64
    assert sum(sum(uses.values()) for uses in card["prompts"].values()) == 60
    assert card["words"]["prompt"] == {"count": 60, "mean": 2.0, "p50": 2, "p95": 2, "max": 2}
    assert card["rows"]["reasons"] == [{"reason": "empty reply", "count": 2, "rows": {"rows.jsonl": [2, 3]}}]
    text = datacard.render(card)
    assert (
        "| 2 | empty reply | rows.jsonl: 2, 3 |" in text and "Of 60 rows 58 were kept and 2 dropped" in text
    )


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_lengths_are_nearest_rank_percentiles(counts):
    import numpy as np

    lengths = datacard._lengths("word " * count for count in counts)
    assert lengths["p95"] == np.percentile(counts, 95, method="inverted_cdf")
    assert lengths["p50"] == np.percentile(counts, 50, method="inverted_cdf")
    assert lengths["max"] == max(counts)


# The embedded world and real data


def test_the_helpdesk_has_distinct_prompts_and_demonstrations_for_sft():
    config = Config(prompts=300, documents=50)
    prepared = from_helpdesk(config)
    records = prepared.records.values()
    assert len(records) == 300 and len(prepared.corpus) == 50 and not prepared.judgements
    assert all((r.completion is not None) == (r.use == "sft") and r.facts for r in records)
    assert from_helpdesk(config) == prepared
    assert from_helpdesk(Config(prompts=300, documents=50, seed=1)).records.keys() != prepared.records.keys()


def test_hh_rlhf_every_row_is_accounted_for(shared):
    prepared = prepare(str(shared / "hh-rlhf" / "harmless-base.jsonl.gz"))
    reasons = accounted(prepared)
    assert prepared.read == 1800
    assert reasons["empty reply"] == 4
    assert reasons["no common prompt: the sides differ before their last turn"] == 2
    assert reasons["the turns of user and assistant do not alternate"] == 3
    assert len(prepared.records) == 1789
    assert all(r.prompt[-1].role == "user" for r in prepared.records.values())
    assert len([j for j in prepared.judgements if j.split != "train"]) > 250


@pytest.mark.parametrize(
    "name",
    [
        "tulu1-human-eval/eval_instances_tulu_1.jsonl.gz",
        "instructions/seed_tasks.jsonl",
        "instructions/kto_en_demo.json",
        "alpaca-eval/weighted_gpt4_turbo_10models.jsonl.gz",
        "tinystories/tinystories_sample.txt",
        "wnut17/emerging.dev.conll",
    ],
)
def test_files_of_other_shapes_are_refused_in_one_line(shared, name):
    with pytest.raises(DataError) as error:
        list(read(shared / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_kto_rows_are_read_once_they_are_lines(shared, file):
    rows = json.loads((shared / "instructions" / "kto_en_demo.json").read_text())
    prepared = prepare(file(*rows))
    accounted(prepared)
    liked = {r["messages"][-1]["content"].strip() for r in rows if r["label"]}
    assert {r.completion for r in prepared.records.values() if r.completion} <= liked
    assert len(prepared.records) > 250
