"""The command line: exit codes, one line for whatever the user can mend, and how fast it answers."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from annotate.records import Message, Record, prompt_id
from stages import cli
from stages.config import STAGES
from stages.manifest import load_manifest
from tests import toys

PREFLOOP = [sys.executable, "-m", "stages.cli"]
EXPERIMENT = Path("configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("PREFLOOP_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def toy(monkeypatch, tmp_path) -> str:
    toys.install(monkeypatch)
    (tmp_path / "toy.yaml").write_text(toys.EXPERIMENT)
    return str(tmp_path / "toy.yaml")


def experiment(folder: Path, stages: str) -> Path:
    path = folder / "real.yaml"
    path.write_text(f"name: real\nseed: 0\nstages:\n{stages}")
    return path


# Bad input, on the real stages.

HELPDESK = "  prepare: {data: helpdesk, prompts: 40, documents: 20}\n"
SFT = "  sft: {model: MODEL, data: prepare}\n"

BAD_COMMANDS = {
    ("frobnicate",): "no command frobnicate",
    ("run",): "the following arguments are required: CONFIG",
    ("run", "nowhere.yaml"): "nowhere.yaml: no such experiment file",
    ("run", EXPERIMENT, "sft.trainr.learning_rate=1"): "sft.trainr: unknown setting; did you mean trainer?",
    ("run", EXPERIMENT, "sft.max_length=long"): "sft.max_length: Input should be a valid integer",
    ("run", EXPERIMENT, "sfd.max_length=3"): "the experiment has no stage sfd; did you mean sft?",
    ("run", EXPERIMENT, "prepare.use={sft: 0.5}"): "prepare: use: the shares add up to 0.5, not 1",
    ("run", EXPERIMENT, "evaluate.policies={ppo: ppo}"): "one policy must be named sft",
    ("run", EXPERIMENT, "sft.model=ppo"): "stages read one another in a circle",
    ("run", EXPERIMENT, "--seeds", "one"): "'one' is not a list of whole numbers such as 0,1,2",
    ("run", EXPERIMENT, "--sed", "1"): "unrecognized arguments: --sed 1",
    ("run", EXPERIMENT, "--only", "sfd"): "no stage sfd; did you mean sft?",
    ("run", EXPERIMENT, "--force", "sfd"): "no stage sfd; did you mean sft?",
    (
        "run",
        EXPERIMENT,
        "sft.trainer.learning_rat=1",
    ): "stages.arguments.EngineArguments has no such setting; did you mean learning_rate?",
    (
        "run",
        EXPERIMENT,
        "rm.trainer.max_tokens_per_batch=0",
    ): "rm.trainer: max_tokens_per_batch is 0: give 1 or more",
}


@pytest.mark.parametrize("argv", BAD_COMMANDS, ids=lambda argv: " ".join(map(str, argv)))
def test_a_bad_command_changes_nothing(fails, runs, argv):
    assert BAD_COMMANDS[argv] in fails(*argv, code=2)
    assert not list(runs.glob("*/*"))


def test_a_stage_asked_for_before_its_input(fails):
    assert f"sft waits for pretrain, prepare: run `prefloop run {EXPERIMENT}`" in fails("sft", EXPERIMENT)


def test_a_missing_data_file(fails, tmp_path):
    line = fails("run", experiment(tmp_path, "  prepare: {data: rows.jsonl}\n"))
    assert "prepare.data: rows.jsonl: no such file or folder" in line


@pytest.mark.parametrize("text", ["", "\n\n"], ids=["empty", "blank"])
def test_an_empty_data_file(fails, runs, tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    line = fails("run", experiment(tmp_path, f"  prepare: {{data: {tmp_path}/rows.jsonl}}\n"))
    assert "no usable row" in line
    assert load_manifest(next(runs.glob("real/prepare/*"))).status == "failed"


def test_rows_that_are_no_judgements_are_named_by_number(fails, tmp_path):
    prompt = [Message(role="user", content="Hello")]
    row = Record(id=prompt_id(prompt), split="train", use="preference", prompt=prompt)
    (tmp_path / "judgements.jsonl").write_text(f"{row.model_dump_json()}\nnot json\n")
    stages = f"  rm: {{policy: {tmp_path}, judgements: {tmp_path}/judgements.jsonl}}\n"
    line = fails("run", experiment(tmp_path, stages))
    assert re.search(r"judgements.jsonl, row 1, \w+: ", line)


def test_a_folder_that_holds_no_model(fails, tmp_path):
    (tmp_path / "model").mkdir()
    path = experiment(tmp_path, HELPDESK + SFT.replace("MODEL", str(tmp_path / "model")))
    assert "sft" in fails("run", path) and "model" in fails("run", path)


def test_a_base_model_path_that_is_not_there(fails, tmp_path):
    path = experiment(tmp_path, HELPDESK + SFT.replace("MODEL", "./models/none"))
    assert "sft.model: ./models/none: no such file or folder" in fails("run", path)


def test_a_folder_of_runs_that_cannot_be_made(fails, toy, monkeypatch):
    monkeypatch.setenv("PREFLOOP_RUNS", "/dev/null/runs")
    assert "error: /dev/null/runs" in fails("run", toy)


def test_publishing_without_a_report(fails, tmp_path):
    line = fails("run", experiment(tmp_path, HELPDESK), "--publish", code=2)
    assert "no report stage" in line


# What happens in the middle of a run, on toys.


def test_an_interrupted_run_says_how_to_go_on(fails, toy, runs):
    line = fails("run", toy, "train.end=interrupt", code=130)
    assert f"the same command continues: prefloop run {toy} train.end=interrupt" in line
    assert load_manifest(next(runs.glob("toy/train/*"))).status == "interrupted"
    assert cli.main(["run", toy]) == 0


def test_a_full_disk_names_the_folder_and_a_later_run_goes_on(fails, toy, runs):
    line = fails("run", toy, "train.end=full")
    assert "no space left on the disk" in line and str(runs / "toy" / "train") in line
    assert load_manifest(next(runs.glob("toy/train/*"))).status == "failed"
    assert cli.main(["run", toy]) == 0


def test_a_bug_in_a_stage_leaves_its_traceback_in_the_run(fails, toy, runs):
    line = fails("run", toy, "train.end=crash")
    report = next(runs.glob("toy/train/*")) / "traceback.txt"
    assert f"IndexError: list index out of range and more (the whole story: {report})" in line
    assert "in finish" in report.read_text()


def test_a_failed_gate_stops_what_follows(fails, toy, runs):
    assert "train: check failed: good enough: 3 of 10" in fails("run", toy, "train.end=gate")
    assert not (runs / "toy" / "gather").exists()
    assert cli.main(["run", toy, "train.end=gate", "train.gate=warn"]) == 0


def test_sigterm_is_an_interruption(toy, runs):
    command = [sys.executable, "-m", "tests.toys", "run", toy, "train.steps=1000", "train.pause=0.05"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(200):
        time.sleep(0.05)
        if next(runs.glob("toy/train/*/checkpoint"), None):
            break
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.startswith("error: stopped; the same command continues: ") and errors.count("\n") == 1
    assert load_manifest(next(runs.glob("toy/train/*"))).status == "interrupted"


# The commands.


def test_status_tells_complete_from_waiting(toy, capsys):
    cli.main(["make", toy])
    capsys.readouterr()
    assert cli.main(["status", toy]) == 0
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row for row in rows if len(row) > 1}
    assert found["make"][1] == "complete" and found["make"][6] == "length 5"
    assert found["train"][1] == "to be run" and len(found["train"][2]) == 12
    assert found["gather"][1] == "waits for train"


def test_a_stage_command_runs_that_stage_and_force_makes_it_anew(toy, runs):
    assert cli.main(["make", toy]) == cli.main(["make", toy]) == 0
    assert len(list(runs.glob("toy/make/*"))) == 1
    assert cli.main(["make", toy, "--force"]) == 0
    assert len(list(runs.glob("toy/make/*"))) == 2 and not (runs / "toy" / "train").exists()


def test_options_may_stand_anywhere(toy, runs):
    assert cli.main(["run", toy, "train.steps=1", "--seeds", "3", "make.text=y"]) == 0
    manifest = load_manifest(next(runs.glob("toy/train/*")))
    assert manifest.seed == 3 and manifest.settings["steps"] == 1
    assert manifest.command == f"prefloop run {toy} train.steps=1 --seeds 3 make.text=y"


def test_clean_asks_first(fails, toy, runs, capsys):
    cli.main(["run", toy, "make.text=old"])
    cli.main(["run", toy])
    folders = set(runs.glob("toy/*/*"))
    assert len(folders) == 6
    capsys.readouterr()
    assert "say --yes" in fails("clean", toy, code=2)
    assert set(runs.glob("toy/*/*")) == folders
    assert cli.main(["clean", toy, "--yes"]) == 0
    assert "removed 3 folders" in capsys.readouterr().out
    assert len(set(runs.glob("toy/*/*"))) == 3
    assert cli.main(["clean", toy]) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize("kind", STAGES)
def test_help_of_a_stage_explains_every_setting(kind, capsys):
    from stages.config import module

    assert cli.main([kind, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"prefloop {kind} configs/" in text and "Writes" in text
    for name in module(kind).Config.model_fields:
        assert re.search(rf"^  {name}: ", text, re.M)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_explains_every_option(command, capsys, monkeypatch):
    options: list[str] = []

    class Noted(cli.Usage):
        def parse_intermixed_args(self, *_):
            options.extend(name for action in self._actions for name in action.option_strings)
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "Usage", Noted)
    with pytest.raises(KeyboardInterrupt):
        cli.COMMANDS[command]([], "")
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: prefloop {command} CONFIG") and f"  {command} CONFIG " in text
    for option in set(options) - {"-h", "--help"}:
        assert re.search(rf"{option}\b", text), option


def test_the_manifest_is_plain_json(toy, runs):
    cli.main(["run", toy])
    found = json.loads((next(runs.glob("toy/gather/*")) / "manifest.json").read_text())
    assert found["inputs"]["trained.0"]["run"] == str(next(runs.glob("toy/train/*")))


# Speed, in fresh processes: once is enough, since other work on the machine is not ours.

LIBRARIES = "import importlib.metadata, pydantic.main, rich.progress, rich.table, yaml"


@pytest.mark.parametrize("argv", [["--help"], ["status", str(EXPERIMENT)]], ids=["help", "status"])
def test_answers_at_once(argv):
    """Half a second of the processor; on a slower one, three times what loading its libraries takes there."""
    libraries = min(processor_seconds([sys.executable, "-c", LIBRARIES]) for _ in range(4))
    assert any(processor_seconds([*PREFLOOP, *argv]) < max(0.5, 3 * libraries) for _ in range(8))


def processor_seconds(command: list[str]) -> float:
    before = os.times()
    seconds(command)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_second_run_is_done_at_once(toy):
    command = [sys.executable, "-m", "tests.toys", "run", toy]
    seconds(command)
    assert any(seconds(command) < 2 for _ in range(3))


def seconds(command: list[str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


def test_a_stage_module_is_a_command_too(tmp_path, runs):
    path = experiment(tmp_path, HELPDESK)
    seconds([sys.executable, "-m", "stages.prepare", str(path)])
    assert load_manifest(next(runs.glob("real/prepare/*"))).status == "complete"
    assert not os.environ.get("HF_HUB_OFFLINE")  # hub ids have to work for users
