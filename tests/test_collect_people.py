"""The stage collect with checks, repeats and limits for people; the commands that pause and close a round."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from annotate import quality
from annotate.records import DataError, Judgement, read
from annotate.rules import Check, Qualify, Rules
from annotate.store import Store
from stages.collect import Config, main
from stages.config import UserError
from stages.manifest import Input, Manifest
from stages.plan import run_key
from stages.run import Run
from tests import tiny
from tests.test_extras import CHECKS, ITEMS, check, right, work, wrong

EXPERIMENT = """
name: test
stages:
  prepare: {data: helpdesk}
  sample: {policy: some-model, prompts: prepare}
  collect: {items: sample, annotators: people}
"""
ROUND = "test/collect/people-0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path))
    tiny.rows_file(tmp_path / "items.jsonl", ITEMS[:30])
    tiny.rows_file(tmp_path / "checks.jsonl", CHECKS)
    (tmp_path / "test.yaml").write_text(EXPERIMENT)
    return tmp_path


def collect(folder: Path, **settings: Any) -> tuple[list[Judgement], Manifest]:
    manifest = Manifest(experiment="test", stage="collect", kind="collect", seed=0)
    run = Run(folder / "run", manifest)
    main(Config(items=str(folder / "items.jsonl"), annotators="people", **settings), run)
    return read(folder / "run" / "judgements.jsonl", Judgement), run.manifest


def test_checks_and_repeats_are_in_the_manifest_and_in_no_judgement(folder: Path) -> None:
    store = Store()
    rules = Rules(repeats=0.2)
    round_id = store.open_round(ROUND, ITEMS[:30], salt="0", overlap=2, checks=CHECKS, rules=rules)
    work(store, round_id, "ann", right)
    work(store, round_id, "bob", lambda view: wrong(view) if "check" in view.messages[0]["content"] else 2)
    judgements, manifest = collect(
        folder, overlap=2, checks=str(folder / "checks.jsonl"), repeats=0.2, qualify=None
    )
    assert len(judgements) == 60 and not {c.task for c in CHECKS} & {row.task for row in judgements}
    assert manifest.facts["checks_by"] == {"ann": {"right": 5, "of": 5}, "bob": {"right": 0, "of": 5}}
    assert manifest.metrics["check_accuracy"] == 0.5
    by = manifest.facts["repeats_by"]
    assert by["ann"]["alike"] == by["ann"]["of"] > 2 and by["bob"]["alike"] == 0 < by["bob"]["of"]
    found = manifest.metrics
    assert found["self_consistency_low"] < found["self_consistency"] < found["self_consistency_high"]
    assert 0.5 < found["repeats_first_shown_wins"] < 1
    assert manifest.facts["labels_by"] == {"ann": 30, "bob": 30}


def test_a_round_without_them_says_nothing_of_them(folder: Path) -> None:
    store = Store()
    work(store, store.open_round(ROUND, ITEMS[:30], salt="0"), "ann")
    _, manifest = collect(folder)
    assert not {"checks_by", "repeats_by"} & manifest.facts.keys()
    assert not {"check_accuracy", "self_consistency"} & manifest.metrics.keys()


def test_the_settings_arrive_in_the_round_and_leave_the_key(folder: Path) -> None:
    store, checks = Store(), str(folder / "checks.jsonl")
    round_id = store.open_round(ROUND, ITEMS[:30], salt="0")
    quality.set_state(store, round_id, "closed")
    with pytest.raises(UserError, match="every item was skipped"):
        collect(folder, checks=checks, qualify={"checks": 2, "right": 1}, repeats=0.1, at_most=9)
    quality.set_state(store, round_id, "open")
    assert len(work(store, round_id, "ann", wrong)) == 2
    assert len(work(store, round_id, "bob")) == 14
    plain = Config(items="x", annotators="people", seed=0)
    more = {"checks": checks, "qualify": Qualify(checks=2, right=1), "repeats": 0.1, "at_most": 9}
    inputs = {"items": Input(ref="x", path="x", digest="abc")}
    with_checks = inputs | {"checks": Input(ref=checks, path=checks, digest="def")}
    assert run_key("collect", plain, inputs) == run_key("collect", plain.model_copy(update=more), with_checks)


def test_a_run_that_waits_goes_on_with_what_is_there_when_the_round_is_closed(folder: Path) -> None:
    outcome: list[Any] = []
    waiting = threading.Thread(target=lambda: outcome.append(collect(folder)), daemon=True)
    waiting.start()
    store = Store()
    while (round_id := store.round(ROUND)) is None:
        time.sleep(0.01)
    work(store, round_id, "ann", most=4)
    time.sleep(1.2)
    assert not outcome
    quality.set_state(store, round_id, "closed")
    waiting.join(timeout=10)
    assert len(outcome[0][0]) == 4


def test_the_commands_pause_close_and_open_again(
    folder: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    from stages import cli

    config = folder / "test.yaml"
    assert f"no round {ROUND} yet" in fails("annotate", config, "--pause")
    store = Store()
    round_id = store.open_round(ROUND, ITEMS[:30], salt="0")
    work(store, round_id, "ann", most=2)
    for option, state in (("--pause", "paused"), ("--resume", "open"), ("--close", "closed")):
        assert cli.main(["annotate", str(config), option]) == 0
        assert capsys.readouterr().out == f"{ROUND}: {state}, 2 of 30 labels are there\n"
        assert quality.state(store, round_id) == state
    assert "not allowed with" in fails("annotate", config, "--pause", "--close", code=2)


def test_of_several_rounds_the_first_that_is_not_complete_is_meant(
    folder: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    from stages import cli

    config, items = folder / "test.yaml", folder / "items.jsonl"
    rounds = {
        name: {"stage": "collect", "items": str(items), "annotators": "people"} for name in ("one", "two")
    }
    config.write_text(yaml.safe_dump({"name": "test", "stages": rounds}, sort_keys=False))
    store = Store()
    work(store, store.open_round("test/one/people-0", ITEMS[:30], salt="0"), "ann")
    assert cli.main(["annotate", str(config), "--pause"]) == 0
    assert "test/one/people-0: paused" in capsys.readouterr().out
    assert cli.main(["run", str(config), "--only", "one"]) == 0
    assert "no round test/two/people-0 yet" in fails("annotate", config, "--pause")
    work(store, store.open_round("test/two/people-0", ITEMS[:30], salt="0"), "ann")
    assert cli.main(["run", str(config), "--only", "two"]) == 0
    assert cli.main(["annotate", str(config), "--close"]) == 0
    assert "test/two/people-0: closed" in capsys.readouterr().out


CHECK = json.loads(check(0).model_dump_json())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [CHECK | {"better": 2}],
            "row 1, the whole row: Value error, better: 2, but the last completion is 1",
        ),
        ([CHECK | {"better": -1}], "row 1, better: Input should be greater than or equal to 0"),
        ([CHECK | {"better": None}], "row 1, better"),
        ([CHECK | {"answer": 1}], "row 1, answer: Extra inputs are not permitted"),
        ([CHECK | {"feedback": ""}], "row 1, feedback"),
        ([CHECK | {"prompt": []}], "row 1, prompt"),
        ([CHECK | {"completions": ["a"]}], "row 1, completions"),
        ([CHECK | {"completions": ["a", "a"]}], "two are the same"),
        ([CHECK | {"completions": ["a", "b", "c"]}], "check 1: 3 replies, a form of kind pairwise needs 2"),
        ([CHECK, CHECK | {"better": 1}], "check 2: the same as check 1"),
        ([], "no checks in it"),
    ],
)
def test_a_file_of_checks_that_will_not_do_is_one_line(
    folder: Path, rows: list[dict[str, Any]], says: str
) -> None:
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises((DataError, UserError)) as error:
        collect(folder, checks=str(path))
    assert f"{path}" in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_checks_of_a_rating_and_too_few_to_qualify_are_refused(folder: Path) -> None:
    form = folder / "rating.yaml"
    form.write_text("kind: rating")
    tiny.rows_file(folder / "items.jsonl", [i.model_copy(update={"completions": ["a"]}) for i in ITEMS])
    checks = str(folder / "checks.jsonl")
    with pytest.raises(UserError, match="check 1: checks compare replies; a form of kind rating asks for no"):
        collect(folder, form=str(form), checks=checks)
    tiny.rows_file(folder / "items.jsonl", ITEMS)
    with pytest.raises(UserError, match="5 checks, and qualify asks for 6"):
        collect(folder, checks=checks, qualify={"checks": 6, "right": 0.5})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["collect.repeats=0.9"], "collect.repeats: Input should be less than or equal to 0.5"),
        (["collect.repeats=-1"], "collect.repeats: Input should be greater than or equal to 0"),
        (["collect.at_most=0"], "collect.at_most: Input should be greater than or equal to 1"),
        (["collect.qualify={checks: 2, right: 0.5}"], "qualify needs checks"),
        (["collect.checks=c.jsonl", "collect.qualify={checks: 0, right: 1}"], "collect.qualify.checks"),
        (["collect.checks=c.jsonl", "collect.qualify={checks: 2, right: 80}"], "collect.qualify.right"),
        (["collect.checks=c.jsonl", "collect.qualify={checks: 2}"], "collect.qualify.right: is missing"),
        (["collect.checks=c.jsonl", "collect.qualify={checks: 2, rigth: 1}"], "did you mean right"),
        (["collect.checks=none.jsonl"], "none.jsonl: no such file"),
        (["collect.annotators=simulated", "collect.repeats=0.1"], "repeats is for annotators=people"),
        (["collect.annotators=simulated", "collect.checks=c.jsonl"], "checks is for annotators=people"),
        (["collect.annotators=simulated", "collect.at_most=3"], "at_most is for annotators=people"),
    ],
)
def test_settings_that_will_not_do_are_one_line(
    folder: Path, fails: Callable[..., str], settings: list[str], says: str
) -> None:
    run = Run(folder / "test" / "sample" / "a", Manifest(experiment="test", stage="sample", kind="sample"))
    with run.recorded():
        tiny.rows_file(run.output("items.jsonl"), ITEMS)
    code = 1 if "none.jsonl" in says else 2
    assert says in " ".join(fails("annotate", folder / "test.yaml", *settings, code=code).split())


def test_the_documentation_s_settings_and_check_are_what_is_read() -> None:
    text = Path("annotate/README.md").read_text()
    [row] = [line for line in text.splitlines() if '"better": 1' in line]
    parsed = Check.model_validate_json(row)
    assert parsed.completions[parsed.better] == "4" and parsed.feedback == "4, of course."
    block = text.partition("    collect:\n")[2].partition("\n\n")[0]
    config = Config.model_validate(yaml.safe_load(block))
    assert config.qualify == Qualify(checks=5, right=0.8) and (config.repeats, config.at_most) == (0.05, 300)
