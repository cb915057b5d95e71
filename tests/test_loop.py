"""The whole loop on configs/smoke.yaml through the real command line: completes, repeats, survives kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from annotate.recording import Label
from annotate.records import Completion, Judgement, read
from annotate.store import Store
from stages.config import load
from stages.manifest import load_manifest

CONFIG = "configs/smoke.yaml"
RUN = ["run", CONFIG]
STAGES = load(CONFIG).stages
LABELS_ONE_BY_ONE = "import stages.collect as c; c.BATCH = 1"
"""Simulated labels are saved some hundred at a time: too fast to be killed in the middle."""


def start(runs: Path, *argv: str, before: str = "pass", log: Path | None = None) -> subprocess.Popen[str]:
    """`prefloop argv` in a process of its own; its output goes to `log`."""
    program = f"{before}; from stages.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    with (log or runs.parent / "log").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", program, *argv],
            env=os.environ | {"PREFLOOP_RUNS": str(runs)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def prefloop(runs: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", *argv],
        env=os.environ | {"PREFLOOP_RUNS": str(runs)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def copy(smoke_runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """The finished runs in a folder of their own, without those of some stages."""

    def make(*without: str) -> Path:
        runs = tmp_path / "runs"
        shutil.copytree(smoke_runs, runs)
        for stage in without:
            shutil.rmtree(runs / "smoke" / stage)
        if "collect" in without:
            for path in runs.glob("labels.db*"):
                path.unlink()
        return runs

    return make


def one(runs: Path, pattern: str) -> Path:
    [path] = runs.glob(f"smoke/{pattern}")
    return path


def table(runs: Path) -> bytes:
    return one(runs, "report/*/table.csv").read_bytes()


def test_the_loop_completes_and_measures_every_policy(smoke_runs: Path) -> None:
    for stage in STAGES:
        assert load_manifest(one(smoke_runs, f"{stage}/*")).status == "complete"
    lines = table(smoke_runs).decode().splitlines()
    policies = list(dict.fromkeys(line.split(",")[0] for line in lines[1:]))
    assert policies == ["base", "sft", "best-of-4 (rm)", "best-of-4 (rubric)", "dpo", "ppo"]
    page = one(smoke_runs, "report/*/README.md").read_text()
    assert f"```\nprefloop run {CONFIG}\n```" in page
    assert str(smoke_runs) not in page
    lineage = json.loads(one(smoke_runs, "report/*/table.json").read_text())["runs"]
    assert {folder.split("/")[1] for folder in lineage} == set(STAGES) - {"evaluate", "report"}


def test_a_second_run_only_prints_the_table(smoke_runs: Path) -> None:
    began = time.monotonic()
    output = prefloop(smoke_runs, *RUN)
    assert time.monotonic() - began < 5
    assert "10 of 10 stages are complete" in output and "smoke: quality" in output
    assert re.search(r"^\| ppo\b", output, re.M)
    assert all(len(list(smoke_runs.glob(f"smoke/{stage}/*"))) == 1 for stage in STAGES)


def test_the_same_seed_gives_the_same_bytes(smoke_runs: Path, tmp_path: Path) -> None:
    prefloop(tmp_path / "again", *RUN)
    assert table(tmp_path / "again") == table(smoke_runs)
    for stage in STAGES:
        before, after = (load_manifest(one(runs, f"{stage}/*")) for runs in (smoke_runs, tmp_path / "again"))
        assert before.key == after.key
        if stage != "report":  # its page says when and where
            assert {name: out.digest for name, out in before.outputs.items()} == {
                name: out.digest for name, out in after.outputs.items()
            }, stage


def test_killed_in_three_stages_it_ends_in_the_same_table(
    copy: Callable[..., Path], smoke_runs: Path, tmp_path: Path
) -> None:
    runs, log = copy("sft", "collect", "ppo", "evaluate", "report"), tmp_path / "log"

    def labels() -> bool:
        if not (runs / "labels.db").exists() or not list(runs.glob("smoke/collect/*/manifest.json")):
            return False
        store = Store(f"sqlite:///{runs}/labels.db")
        found = store.round(f"smoke/collect/{one(runs, 'collect/*').name}")
        return found is not None and store.progress(found).done >= 10

    for stage, begun in (
        ("sft", lambda: list(runs.glob("smoke/sft/*/checkpoints/*/complete"))),
        ("collect", labels),
        ("ppo", lambda: list(runs.glob("smoke/ppo/*/checkpoints/*/complete"))),
    ):
        process = start(runs, *RUN, before=LABELS_ONE_BY_ONE if stage == "collect" else "pass", log=log)
        until(begun, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert load_manifest(one(runs, f"{stage}/*")).status == "running", "killed too late to show anything"
    assert "to be run" not in (status := prefloop(runs, "status", CONFIG)) and "interrupted" in status

    output = log.read_text() + prefloop(runs, *RUN)
    for stage in ("sft", "collect", "ppo"):
        assert f"{stage}: continuing in " in output
    for stage in ("sft", "ppo"):
        assert re.search(rf"{stage}: continuing from checkpoint-\d+", output)
    assert table(runs) == table(smoke_runs)


def test_people_are_waited_for_and_can_be_waited_for_later(copy: Callable[..., Path], tmp_path: Path) -> None:
    runs, log = copy("collect", "rm", "dpo", "ppo", "evaluate", "report"), tmp_path / "log"
    command = [*RUN, "collect.annotators=people", "collect.labels=40"]
    store = Store(f"sqlite:///{runs}/labels.db")

    process = start(runs, *command, log=log)
    until(lambda: "40 labels missing" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    line = log.read_text().splitlines()[-1]
    assert line == f"error: stopped; the same command continues: prefloop {' '.join(command)}"
    assert load_manifest(one(runs, "collect/*")).status == "interrupted"

    label(store, "ann", 25)
    process = start(runs, *command, log=log)
    until(lambda: "15 labels missing" in log.read_text(), process)
    label(store, "bob", 15)
    assert process.wait(timeout=200) == 0, log.read_text()
    rows = read(one(runs, "collect/*/judgements.jsonl"), Judgement)
    assert [row.kind for row in rows] == ["person"] * 40
    assert load_manifest(one(runs, "collect/*")).facts["labels_by"] == {"ann": 25, "bob": 15}
    assert "Judgements behind the trained rows: people." in one(runs, "report/*/README.md").read_text()


def label(store: Store, name: str, count: int) -> None:
    """Says of `count` pairs that the longer reply is better, as the page would."""
    round_id = store.round("smoke/collect/people-0")
    assert round_id is not None
    annotator = store.annotator(name)
    for _ in range(count):
        [view] = store.step(round_id, annotator, want=1)[1]
        first, second = map(len, view.completions)
        said = Label(token=f"{view.key}-0", preference=2 if first > second else -2)
        store.step(round_id, annotator, [said])


# Base models from elsewhere.


def save_checkpoint(folder: Path, family: str, base: Path) -> Path:
    """Two layers of a family, untrained; GPT-2 ends at id 1, Llama lacks a pad token, Qwen2 a template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + 8,  # spare rows, as many checkpoints have
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    if family == "llama":
        tokenizer.pad_token = None
    if family == "qwen2":
        tokenizer.chat_template = None
    if family == "gpt2":
        assert tokenizer.eos_token_id == config.eos_token_id == 1
        tokenizer.eos_token = None  # only the config knows
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ADDED = {
    "llama": "pad token '<|pad|>' added",
    "qwen2": "chat template added",
    "gpt2": "stop token '<|end|>' taken from the model's config",
}


@pytest.mark.parametrize("family", ADDED)
def test_a_local_folder_can_be_the_base(copy: Callable[..., Path], tmp_path: Path, family: str) -> None:
    runs = copy("sft", "sample")
    path = save_checkpoint(tmp_path / family, family, one(runs, "pretrain/*/model"))
    settings = [f"sft.model={path}", "sft.trainer.max_steps=2", "sample.train=4", "sample.held_out=2"]
    prefloop(runs, *RUN, *settings, "--only", "sft", "--only", "sample")
    assert load_manifest(one(runs, "sft/*")).facts["added_to_the_checkpoint"] == [ADDED[family]]
    replies = read(one(runs, "sample/*/completions.jsonl"), Completion)
    assert len(replies) == 12 and any(reply.completion for reply in replies)
    for reply in replies:
        assert reply.stopped == (reply.tokens[-1] == 1) and 1 not in reply.tokens[:-1]
