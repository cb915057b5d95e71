"""Bad input met by the real stages, through the command line: one line that says what and where, and no more.

What is wrong with commands and settings is in tests/test_cli.py.
"""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from annotate.records import Judgement, Message, Record, prompt_id, write
from stages.manifest import load_manifest

CONFIG = "configs/smoke.yaml"


@pytest.fixture(scope="module")
def finished(smoke_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished smoke run; what fails here adds folders of failed runs, and nothing else."""
    runs = tmp_path_factory.mktemp("bad") / "runs"
    shutil.copytree(smoke_runs, runs)
    return runs


@pytest.fixture
def smoke(
    finished: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> Iterator[Callable[..., str]]:
    """Runs one stage of the smoke experiment with an override; it must fail. Returns what it says."""
    monkeypatch.setenv("PREFLOOP_RUNS", str(finished))
    before = complete(finished)

    def call(stage: str, *overrides: str, code: int = 1) -> str:
        return fails("run", CONFIG, *overrides, "--only", stage, code=code)

    yield call
    assert complete(finished) == before, "something that failed looks complete"


def complete(runs: Path) -> set[Path]:
    manifests = runs.glob("smoke/*/*/manifest.json")
    return {path.parent for path in manifests if load_manifest(path.parent).status == "complete"}


def model(runs: Path, stage: str) -> Path:
    [path] = runs.glob(f"smoke/{stage}/*/model")
    return path


def demonstrations(
    path: Path, *texts: str, use: str = "sft", reply: str | None = "Sorry. We send a new one."
) -> str:
    prompts = [[Message(role="user", content=text)] for text in texts]
    write(
        path,
        [Record(id=prompt_id(p), split="train", use=use, prompt=p, completion=reply) for p in prompts],
    )
    return str(path)


LONG = "my kettle broke and nobody answers " * 100


def test_an_unreadable_row_is_named_by_its_number(smoke, tmp_path):
    path = demonstrations(tmp_path / "records.jsonl", "one", "two", "three")
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    assert f"{path}, row 2" in smoke("sft", f"sft.data={path}")


def test_a_row_with_a_wrong_field_is_named_by_its_number(smoke, tmp_path):
    path = demonstrations(tmp_path / "records.jsonl", "one", "two", "three")
    Path(path).write_text(Path(path).read_text().replace('"sft"', '"sfd"'))
    assert f"{path}, row 1, use: " in smoke("sft", f"sft.data={path}")


def test_a_raw_row_that_is_not_json_is_named_by_its_number(smoke, jsonl):
    path = jsonl({"prompt": "a", "completion": "b"}, "not json")
    assert f"{path}, row 2" in smoke("prepare", f"prepare.data={path}")


def test_data_that_is_only_called_gz(smoke, tmp_path):
    (tmp_path / "rows.jsonl.gz").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "rows.jsonl.gz" in smoke("prepare", f"prepare.data={tmp_path}/rows.jsonl.gz")


def test_data_cut_off_in_the_middle(smoke, tmp_path):
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz" in smoke("prepare", f"prepare.data={tmp_path}/cut.jsonl.gz")


def test_no_demonstration_to_train_on(smoke, tmp_path):
    path = demonstrations(tmp_path / "records.jsonl", "one", reply=None)
    assert "no demonstration to train on: 0 in the training split" in smoke("sft", f"sft.data={path}")


def test_demonstrations_longer_than_the_model(smoke, tmp_path):
    path = demonstrations(tmp_path / "records.jsonl", LONG)
    assert "1 longer than 256 tokens" in smoke("sft", f"sft.data={path}")


@pytest.mark.parametrize(("stage", "use"), [("sample", "preference"), ("ppo", "policy")])
def test_a_prompt_longer_than_the_model(smoke, tmp_path, stage, use):
    path = demonstrations(tmp_path / "records.jsonl", LONG, use=use)
    line = smoke(stage, f"{stage}.prompts={path}")
    assert prompt_id([Message(role="user", content=LONG)]) in line
    assert "the 256 positions of the model" in line


def test_no_prompt_to_answer(smoke, tmp_path):
    path = demonstrations(tmp_path / "records.jsonl", "one", use="sft")
    assert "no prompt of use `policy`" in smoke("ppo", f"ppo.prompts={path}")
    assert "no prompt of use `preference`" in smoke("sample", f"sample.prompts={path}")
    assert "evaluate needs two" in smoke("evaluate", f"evaluate.prompts={path}")


def test_no_judgement_to_learn_from(smoke, tmp_path):
    (tmp_path / "judgements.jsonl").touch()
    for stage in ("rm", "dpo"):
        line = smoke(stage, f"{stage}.judgements={tmp_path}/judgements.jsonl")
        assert f"{stage}: no comparison to train on: 0 judgements" in line


def judgements(path: Path, *replies: str, split: str = "train", text: str = "My lamp broke.") -> str:
    prompt = [Message(role="user", content=text)]
    facts = {"id": prompt_id(prompt), "use": "preference", "prompt": prompt, "preference": 1}
    given = {"split": split, "completions": replies, "annotator": "anna", "kind": "person", "round": "one"}
    write(path, [Judgement(**facts, **given)])
    return f"dpo.judgements={path}"


def test_pairs_that_say_nothing(smoke, tmp_path):
    same = judgements(tmp_path / "same.jsonl", "Sorry.", "Sorry.")
    assert "1 judgements, left out {'identical': 1}" in smoke("dpo", same)
    long = judgements(tmp_path / "long.jsonl", "Sorry.", "No.", text=LONG)
    assert "left out {'prompt_too_long': 1}" in smoke("dpo", long)


def test_nothing_held_out_to_stop_by(smoke, tmp_path):
    good = judgements(tmp_path / "good.jsonl", "Sorry.", "No.")
    assert "no held-out pair to stop by" in smoke("dpo", good, "dpo.max_kl=5")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["dpo.objective=dpop"], "dpo.objective: needs to be one of sigmoid, sigmoid_norm, robust, hinge"),
        (["dpo.objective=simpo", "dpo.label_smoothing=0.1"], "dpo: objective simpo has no label_smoothing"),
        (["dpo.objective=orpo", "dpo.max_kl=1"], "dpo: objective orpo has no reference"),
        (["dpo.beta=0"], "dpo.beta: Input should be greater than 0"),
        (["dpo.sft_weight=.inf"], "dpo.sft_weight: Input should be a finite number"),
        (["dpo.max_length=0"], "dpo.max_length: Input should be greater than or equal to 1"),
        (
            ["dpo.trainer.num_train_epochs=0", "dpo.trainer.max_steps=-1"],
            "num_train_epochs is 0: give more than 0, or max_steps",
        ),
        (["dpo.trainer.per_device_train_batch_size=0"], "per_device_train_batch_size is 0: give 1 or more"),
        (["dpo.trainer.label_smoothing_factor=0.1"], "label_smoothing_factor: the engine does not use it"),
        (
            ["dpo.trainer.dataloader_drop_last=true"],
            "dataloader_drop_last: the engine does not use it; leave it",
        ),
    ],
)
def test_an_objective_that_cannot_be(smoke, overrides, line):
    assert line in smoke("dpo", *overrides, code=2)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ("{rank: 8}", "peft.rank: peft.LoraConfig has no such setting"),
        ("{peft_type: lorra}", "did you mean LORA?"),
        ("{task_type: SEQ_CLS}", "dpo.peft.task_type: the stage sets it; leave it out"),
        ("{peft_type: ADALORA}", "dpo.peft: AdaLoRA does not work when `total_step` is None"),
    ],
)
def test_adapters_that_cannot_be(smoke, block, line):
    assert line in smoke("dpo", f"dpo.peft={block}", code=2)


def test_a_reward_model_of_another_vocabulary(smoke, finished, tmp_path):
    from tests.tiny import tokenizer_of

    other = tmp_path / "other"
    shutil.copytree(model(finished, "rm"), other)
    tokenizer_of().save_pretrained(other)
    assert "another vocabulary" in smoke("ppo", f"ppo.reward={other}")
    assert "vocabulary" in smoke("evaluate", f"evaluate.reward={other}")


def test_a_policy_where_a_reward_model_belongs(smoke, finished):
    line = smoke("ppo", f"ppo.reward={model(finished, 'sft')}")
    assert "is a LlamaForCausalLM, not a reward model" in line


def test_a_checkpoint_cut_off_in_the_middle(smoke, finished, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(model(finished, "pretrain"), cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(cut) in smoke("sft", f"sft.model={cut}")


def test_text_that_is_not_utf8(smoke, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert "latin.txt: not UTF-8 text" in smoke("pretrain", f"pretrain.texts=[{tmp_path}/latin.txt]")


def test_a_label_database_that_is_none(smoke, tmp_path):
    (tmp_path / "labels.db").write_text("these are no labels, " * 100)
    line = smoke("collect", f"collect.db=sqlite:///{tmp_path}/labels.db", "collect.overlap=3")
    assert "labels.db" in line


def test_an_input_that_was_never_finished(smoke, finished):
    run = model(finished, "pretrain").parent
    copy = finished.parent / "unfinished"
    shutil.copytree(run, copy)
    manifest = load_manifest(copy)
    manifest.status = "interrupted"
    manifest.save(copy)
    line = smoke("sft", f"sft.model={copy}", code=1)
    assert f"{copy}" in line and "interrupted" in line


def test_a_training_that_diverges(smoke):
    line = smoke("dpo", "dpo.trainer.learning_rate=1e30", "dpo.trainer.max_steps=40")
    assert "no finite gradient in" in line and "lower trainer.learning_rate" in line


def test_a_write_that_the_system_refuses_leaves_no_complete_run(tmp_path):
    """Files may be at most 100 kB here, as with a quota: the model does not fit."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    process = start(tmp_path / "runs", limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: ")
    assert {path.parent.name for path in complete(tmp_path / "runs")} <= {"prepare"}


def test_ctrl_c_in_the_middle_of_training(tmp_path):
    runs = tmp_path / "runs"
    process = start(runs)
    while not list(runs.glob("smoke/pretrain/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    assert output.splitlines()[-1] == f"error: stopped; the same command continues: prefloop run {CONFIG}"
    assert load_manifest(next(runs.glob("smoke/pretrain/*"))).status == "interrupted"


def start(runs: Path, before: str = "") -> subprocess.Popen[str]:
    program = before + f"import sys; from stages.cli import main; sys.exit(main(['run', '{CONFIG}']))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PREFLOOP_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
