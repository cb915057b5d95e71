"""Splits and uses, what they promise, and where every row went."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from annotate.records import Judgement, Message, Record, prompt_id, read
from stages import datacard
from stages.cli import main
from stages.manifest import load_manifest
from stages.prepare import Config, Prepared, from_files, from_helpdesk

QUESTION = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]


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


def test_training_sees_no_prompt_in_two_uses(jsonl):
    prepared = prepare(jsonl(*preferences(400)))
    records, judgements = prepared.records.values(), prepared.judgements
    assert len(records) == len({r.id for r in records}) == 400
    assert {r.completion is not None for r in records if r.use == "sft"} == {True}
    assert {r.completion for r in records if r.use != "sft"} == {None}
    assert {j.use for j in judgements if j.split == "train"} == {"preference"}
    held_out = {r.id for r in records if r.split != "train"}
    assert held_out == {j.id for j in judgements if j.split != "train"}
    assert set(Counter(j.use for j in judgements if j.split == "test")) == {"sft", "preference", "policy"}


def test_shares_are_drawn_as_asked(jsonl):
    shares = {"sft": 0.5, "preference": 0.5, "policy": 0.0}
    prepared = prepare(jsonl(*preferences(2000)), split={"test": 0.25}, use=shares)
    splits = Counter(r.split for r in prepared.records.values())
    uses = Counter(r.use for r in prepared.records.values())
    assert set(splits) == {"train", "test"} and set(uses) == {"sft", "preference"}
    assert abs(splits["test"] - 500) < 80 and abs(uses["sft"] - 1000) < 90  # 4 standard deviations


def test_split_and_use_stay_when_rows_are_added_or_reordered(jsonl):
    rows = preferences(200)
    few = prepare(jsonl(*rows[:100], name="few.jsonl")).records
    many = prepare(jsonl(*reversed(rows), name="many.jsonl")).records
    assert all((few[id].split, few[id].use) == (many[id].split, many[id].use) for id in few)


def test_a_conversation_stays_in_the_split_of_its_opening(jsonl):
    short = [[{"role": "user", "content": f"Question {i}?"}, *BLUE] for i in range(100)]
    rows = [{"messages": turns} for turns in [*short, *(turns + QUESTION + BLUE for turns in short)]]
    drawn: dict[str, set[tuple[str, str]]] = {}
    for record in prepare(jsonl(*rows)).records.values():
        drawn.setdefault(record.prompt[0].content, set()).add((record.split, record.use))
    assert len(drawn) == 100 and all(len(both) == 1 for both in drawn.values())
    assert len(set.union(*drawn.values())) > 4


def test_the_place_of_the_preferred_reply_carries_nothing(jsonl):
    judgements = prepare(jsonl(*preferences(1000))).judgements
    first = sum(j.preference == 1 for j in judgements)
    assert abs(first - len(judgements) / 2) < 2 * len(judgements) ** 0.5
    assert all(j.completions[0 if j.preference == 1 else 1].startswith("Good") for j in judgements)
    assert {(j.kind, j.preference) for j in judgements} == {("person", 1), ("person", -1)}


def test_every_row_is_kept_or_dropped_with_a_reason(jsonl):
    rows = [*preferences(50), *preferences(3), {"prompt": "a", "chosen": "", "rejected": "b"}]
    rows += [{"prompt": "Question 7?", "chosen": f"Another {i}.", "rejected": "Bad."} for i in range(20)]
    rows += [{"prompt": "Long " * 30, "chosen": "a", "rejected": "b"}]
    prepared = prepare(jsonl(*rows), max_words=20)
    reasons = accounted(prepared)
    assert prepared.read == 75
    assert reasons["exact duplicate of an earlier row"] == 3
    assert reasons["empty reply"] == reasons["more than 20 words"] == 1
    known = prepared.records[prompt_id([Message(role="user", content="Question 7?")])]
    more = reasons.get("its prompt is there already, and its replies have no use", 0)
    judged = sum(j.id == known.id for j in prepared.judgements)
    assert (more, judged) == ((20, 0) if known.split == "train" and known.use != "preference" else (0, 21))


def test_duplicates_are_found_across_files_and_places_name_the_file(jsonl):
    paths = [jsonl(*preferences(5), name="a.jsonl"), jsonl(*preferences(6), name="b.jsonl")]
    assert accounted(prepared := prepare(*paths)) == {"exact duplicate of an earlier row": 5}
    assert prepared.dropped["exact duplicate of an earlier row"] == [("b.jsonl", n) for n in range(1, 6)]
    assert datacard.names(["w/x/a.jsonl", "w/y/a.jsonl", "z.jsonl"]) == ["x/a.jsonl", "y/a.jsonl", "z.jsonl"]


def test_reads_no_more_rows_than_asked(jsonl):
    assert prepare(jsonl(*preferences(9)), rows=4).read == 4


def test_the_corpus_holds_the_training_split_without_verdicts(jsonl):
    prepared = prepare(jsonl(*preferences(300)))
    train = {r.prompt[0].content for r in prepared.records.values() if r.split == "train"}
    text = "\n\n".join(prepared.corpus)
    assert set(re.findall(r"Question \d+\?", text)) == train
    assert text.count("Good") == text.count("Bad") == len(train)
    first = sum("Good" in document for document in prepared.corpus if "Question" in document)
    assert abs(first - len(train) / 2) < 2 * len(train) ** 0.5


def test_documents_hold_no_blank_line(jsonl):
    prepared = prepare(jsonl({"text": "One.\n\n\u2028Two.\r\n\r\nThree."}))
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


def test_kto_rows_are_read_once_they_are_lines(shared, jsonl):
    rows = json.loads((shared / "instructions" / "kto_en_demo.json").read_text())
    prepared = prepare(jsonl(*rows))
    accounted(prepared)
    liked = {r["messages"][-1]["content"].strip() for r in rows if r["label"]}
    assert {r.completion for r in prepared.records.values() if r.completion} <= liked
    assert len(prepared.records) > 250


# Through the command line


@pytest.fixture
def prefloop(tmp_path, monkeypatch):
    """Runs an experiment of the prepare stage alone; returns the exit code and the folder of its one run."""
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path / "runs"))
    experiment = tmp_path / "real.yaml"
    experiment.write_text("name: real\nstages: {prepare: {}}\n")

    def prefloop(*overrides: str) -> tuple[int, Path | None]:
        code = main(["run", str(experiment), *overrides])
        return code, next(iter(tmp_path.glob("runs/real/prepare/*/manifest.json")), None)

    return prefloop


def test_writes_what_other_stages_read_and_records_the_counts(prefloop, jsonl):
    code, path = prefloop(f"prepare.data={jsonl(*preferences(200))}")
    assert code == 0 and path is not None
    manifest = load_manifest(path.parent)
    assert set(manifest.outputs) == {
        "records.jsonl",
        "judgements.jsonl",
        "corpus.txt",
        "card.json",
        "card.md",
    }
    assert manifest.metrics["prompts"] == 200
    assert manifest.facts["rows"] == {"read": 200, "kept": 200, "dropped": 0}
    assert len(read(path.parent / "records.jsonl", Record)) == 200
    assert len(read(path.parent / "judgements.jsonl", Judgement)) == manifest.metrics["judgements"]
    assert json.loads((path.parent / "card.json").read_text())["sources"][0]["file"] == "rows.jsonl"
    assert "/" not in (path.parent / "card.md").read_text()


def test_several_files_are_one_source(prefloop, jsonl):
    paths = [jsonl(*preferences(8)[:5], name="a.jsonl"), jsonl(*preferences(8)[3:], name="b.jsonl.gz")]
    code, path = prefloop(f"prepare.data=[{', '.join(paths)}]")
    assert code == 0 and path is not None
    manifest = load_manifest(path.parent)
    assert set(manifest.inputs) == {"data.0", "data.1"}
    assert manifest.facts["rows"] == {"read": 10, "kept": 8, "dropped": 2}


def test_the_embedded_world_needs_no_file(prefloop):
    code, path = prefloop("prepare.data=helpdesk", "prepare.prompts=50", "prepare.documents=20")
    assert code == 0 and path is not None
    assert (path.parent / "judgements.jsonl").read_text() == ""
    assert len((path.parent / "corpus.txt").read_text().split("\n\n")) == 20


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (['{"prompt": "a"}', "{"], "row 2, the whole row: Invalid JSON"),
        ([], "no usable row among 0 (the source is empty)"),
        ([{"prompt": "a", "completion": ""}] * 2, "no usable row among 2 (empty reply: 2)"),
    ],
    ids=["unreadable", "empty", "unusable"],
)
def test_bad_data_ends_in_one_line_and_leaves_no_complete_run(prefloop, jsonl, capfd, rows, problem):
    code, path = prefloop(f"prepare.data={jsonl(*rows)}")
    [line] = [line for line in capfd.readouterr().err.splitlines() if problem in line]
    assert code != 0 and "Traceback" not in line
    assert path is None or load_manifest(path.parent).status == "failed"
