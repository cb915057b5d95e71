"""Rows of every shape become prompts and replies, and those that cannot say where and why."""

from pathlib import Path

import pytest

from annotate.records import DataError, Message
from stages.importers import Dropped, Example, paired, read

QUESTION = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]
BLACK = [{"role": "assistant", "content": "Black."}]
ASKED = (Message(role="user", content="What colour is the sky?"),)


def only(path: str) -> Example | Dropped:
    [(number, found)] = read(path)
    assert number == 1
    return found


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
def test_reads_every_shape_in_words_and_in_messages(jsonl, row, chosen, rejected):
    found = only(jsonl(row))
    assert isinstance(found, Example)
    assert (found.prompt, found.chosen, found.rejected) == (ASKED, chosen, rejected)
    assert found.labelled == ("label" in row)


def test_reads_plain_text_and_compressed_files(jsonl):
    assert only(jsonl({"text": " The sky is blue. "}, name="a.jsonl.gz")) == Example(text="The sky is blue.")


def test_a_system_message_and_earlier_turns_stay_in_the_prompt(jsonl):
    system = {"role": "system", "content": "Be brief."}
    found = only(jsonl({"messages": [system, *QUESTION, *BLUE, *QUESTION, *BLACK]}))
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
def test_drops_what_cannot_be_used_and_says_why(jsonl, row, reason):
    assert only(jsonl(row)) == Dropped(reason)


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
def test_refuses_what_cannot_be_read_naming_file_row_and_column(jsonl, rows, problem):
    path = jsonl(*rows)
    with pytest.raises(DataError, match=problem) as error:
        list(read(path))
    assert path in str(error.value) and "\n" not in str(error.value)


def test_refuses_missing_and_broken_files(tmp_path, jsonl):
    with pytest.raises(DataError, match="no such file"):
        list(read(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read(tmp_path))
    whole = Path(jsonl({"text": "a " * 5000}, name="cut.jsonl.gz"))
    whole.write_bytes(whole.read_bytes()[:-12])
    with pytest.raises(DataError, match="is the file complete"):
        list(read(whole))


def test_liked_and_disliked_replies_to_one_prompt_become_a_comparison(jsonl):
    def row(prompt: str, completion: str, label: bool) -> dict[str, object]:
        return {"prompt": prompt, "completion": completion, "label": label}

    path = jsonl(
        row("p", "bad", False), row("q", "fine", True), row("p", "good", True), row("p", "well", True)
    )
    examples = [(("rows", number), found) for number, found in read(path) if isinstance(found, Example)]
    found = [([row for _, row in places], e.chosen, e.rejected) for places, e in paired(examples)]
    assert found == [([1, 3], "good", "bad"), ([2], "fine", None), ([4], "well", None)]


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
