"""SFT stage: every row teaches to stop, nothing is cut, any local folder can be the base."""

import json
import math

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from annotate.records import DataError
from reward.batch import Example
from reward.model import load_policy, load_tokenizer
from reward.tokens import completion_ids, logprobs, prompt_ids
from stages import sft
from stages.arguments import arguments
from stages.config import UserError
from stages.engine import Engine, Epochs
from stages.objectives import NLL
from tests import tiny

TRAINER = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_steps": 4,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return {name: str(tiny.save_folder(folder, name)) for name in tiny.FOLDERS}


def stage(path, model, rows=None, **settings):
    run = tiny.run_in(path, "sft")
    path.parent.mkdir(exist_ok=True, parents=True)
    data = tiny.rows_file(path.parent / "records.jsonl", tiny.records(12) if rows is None else rows)
    chosen = {"trainer": TRAINER, "max_new_tokens": 20} | settings
    sft.main(sft.Config(model=model, data=data, **chosen), run)
    return run


def logged(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", tiny.FOLDERS)
def test_any_local_folder_can_be_the_base(tmp_path, folders, name):
    run = stage(tmp_path / "run", folders[name])
    lines = logged(tmp_path / "run")
    assert len(lines) == 18 and lines[-1]["loss"] < lines[0]["loss"] - 2
    assert run.manifest.facts["added_to_the_checkpoint"] == load_tokenizer(folders[name])[1]
    trained, tokenizer = load_policy(tmp_path / "run/model")
    assert load_tokenizer(tmp_path / "run/model")[1] == []
    start, _ = load_policy(folders[name])
    rows = [
        Example(prompt_ids(tokenizer, r.prompt), (completion_ids(tokenizer, r.completion),))
        for r in tiny.records(12)
    ]

    def of_stop(model):
        return sum(row[-1] for (row,) in logprobs(model, rows)) / 12

    assert of_stop(trained) > of_stop(start) + 1  # it has learnt to end there
    assert run.manifest.metrics["rows"] == 12 and "self_stopping" in run.manifest.metrics


def test_loss_is_on_the_completions_alone(tmp_path, folders):
    """The first logged loss is the mean negative log-likelihood of the completion tokens of that batch."""
    rows = tiny.records(4)
    stage(tmp_path / "run", folders["llama"], rows)
    model, tokenizer = load_policy(folders["llama"])
    examples = [
        Example(prompt_ids(tokenizer, r.prompt), (completion_ids(tokenizer, r.completion),)) for r in rows
    ]
    flat = [x for (row,) in logprobs(model, examples) for x in row]
    assert logged(tmp_path / "run")[0]["loss"] == pytest.approx(-sum(flat) / len(flat), rel=1e-3)


def test_resumed_is_bitwise_uninterrupted(tmp_path, folders, monkeypatch):
    from stages.engine import Reporting
    from stages.pipeline import seed_everything

    def attempt(path):
        seed_everything(0, True)  # as the runner does before each stage
        stage(path, folders["llama"])

    attempt(tmp_path / "straight/run")
    real = Reporting.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporting, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "cut/run")
    attempt(tmp_path / "cut/run")
    straight, cut = ((tmp_path / name / "run/model/model.safetensors") for name in ("straight", "cut"))
    assert straight.read_bytes() == cut.read_bytes()
    losses = [[line["loss"] for line in logged(tmp_path / name / "run")] for name in ("straight", "cut")]
    assert losses[0] == losses[1]


def test_rows_too_long_are_left_out_and_counted(tmp_path, folders):
    _, tokenizer = load_policy(folders["llama"])
    rows = tiny.records(40)
    rows[3] = rows[3].model_copy(update={"completion": "word " * 80})
    run = tiny.run_in(tmp_path, "sft", gate="stop")
    kept = sft.demonstrations(tokenizer, rows, 100, run)
    assert len(kept) == 39 and max(example.length for example in kept) <= 100
    assert run.manifest.metrics["dropped_too_long"] == 1 and run.manifest.metrics["truncated"] == 0
    assert run.manifest.facts["dropped_ids"] == [rows[3].id]
    for example, record in zip(kept, rows[:3], strict=False):
        assert tokenizer.decode(example.completions[0]) == record.completion + "<|end|>"


def test_too_many_rows_too_long_stop_the_run(tmp_path, folders):
    _, tokenizer = load_policy(folders["llama"])
    rows = [
        r.model_copy(update={"completion": "word " * 80}) if i < 3 else r
        for i, r in enumerate(tiny.records(20))
    ]
    with pytest.raises(UserError, match="demonstrations fit: 3 of 20 are longer than 100 tokens"):
        sft.demonstrations(tokenizer, rows, 100, tiny.run_in(tmp_path, "sft", gate="stop"))


def test_nothing_to_train_on(tmp_path, folders):
    for rows in ([], tiny.records(3, split="test"), tiny.records(3, use="policy")):
        with pytest.raises(UserError, match="no demonstration to train on: 0 in the training split"):
            stage(tmp_path / "run", folders["llama"], rows)
    with pytest.raises(UserError, match="3 longer than 5 tokens"):
        stage(tmp_path / "run", folders["llama"], tiny.records(3), max_length=5)


def test_records_without_a_completion_are_counted(tmp_path, folders, capsys):
    rows = tiny.records(12)
    rows[3:5] = [
        rows[3].model_copy(update={"completion": ""}),
        rows[4].model_copy(update={"completion": None}),
    ]
    run = stage(tmp_path / "run", folders["llama"], rows)
    assert run.manifest.metrics["dropped_empty"] == 2 and run.manifest.metrics["rows"] == 10
    assert f"left out 2 records without a completion ({rows[3].id}, ...)" in capsys.readouterr().out


def test_steps_that_a_bad_row_spoils_are_said_and_the_row_is_named(tmp_path, folders, capsys, monkeypatch):
    """One token whose embedding is not a number, in one row of twelve."""
    rows = tiny.records(12)
    rows[5] = rows[5].model_copy(update={"completion": "Zzz"})
    model, tokenizer = load_policy(folders["llama"])
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("Z")["input_ids"][0]] = math.nan
    model.save_pretrained(tmp_path / "bad")
    tokenizer.save_pretrained(tmp_path / "bad")
    with pytest.raises(DataError, match="the model's logits are not finite numbers"):
        stage(tmp_path / "sampled", str(tmp_path / "bad"), rows, max_new_tokens=100)
    monkeypatch.setattr(sft, "measure_stopping", lambda *_: None)
    run = stage(tmp_path / "run", str(tmp_path / "bad"), rows)
    assert run.manifest.facts["not_finite_loss"] == {rows[5].id: 6}
    assert run.manifest.metrics["skipped_steps"] == 6
    line = (
        f"6 of 18 steps had no finite gradient (the loss is not finite of {rows[5].id}): they changed nothing"
    )
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match=r"6 of 6 steps .*: nothing was trained"):
        stage(tmp_path / "all", str(tmp_path / "bad"), rows[5:6])


def test_a_model_with_neither_positions_nor_a_cache_of_keys(tmp_path, folders):
    tokenizer = load_tokenizer(folders["llama"])[0]
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    run = stage(tmp_path / "run", str(tmp_path / "mamba"), gate="warn")
    assert run.manifest.metrics["rows"] == 12 and 0 <= run.manifest.metrics["self_stopping"] <= 1


def test_a_row_that_does_not_end_in_the_stop_token_is_noticed(tmp_path, folders, monkeypatch):
    without_end = lambda tokenizer, texts: tokenizer(list(texts))["input_ids"]  # noqa: E731
    monkeypatch.setattr("reward.tokens.completions_ids", without_end)
    with pytest.raises(UserError, match="does not end in the stop token"):
        stage(tmp_path / "run", folders["llama"])


def test_a_template_that_doubles_the_bos_is_noticed(tmp_path, folders):
    _, tokenizer = load_policy(folders["llama"])
    tokenizer.bos_token = "<|user|>"  # the template begins with it
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="begins with two BOS tokens: the chat template writes one too many"):
        sft.demonstrations(tokenizer, tiny.records(3), 100, tiny.run_in(tmp_path, "sft"))


def test_loss_curve_is_that_of_trl(tmp_path, folders):
    """The same rows in the same batches, 8 optimiser steps: equal to 1e-4 throughout."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 8}
    model, tokenizer = load_policy(folders["llama"])
    examples = sft.demonstrations(tokenizer, tiny.records(12), 100, tiny.run_in(tmp_path / "theirs", "sft"))
    rows = [
        {
            "input_ids": e.prompt + e.completions[0],
            "completion_mask": [0] * len(e.prompt) + [1] * len(e.completions[0]),
        }
        for e in examples
    ]
    common = {"output_dir": str(tmp_path / "theirs"), "report_to": "none", "max_length": None, "bf16": False}
    args = SFTConfig(**settings, **common, completion_only_loss=True, activation_checkpointing=False)
    theirs = InOrder(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    theirs.train()

    class OursInOrder(Epochs):
        def start(self, step):
            for number in range(step, self.total):
                yield [self.examples[(4 * number + i) % 12] for i in range(4)]

    model, _ = load_policy(folders["llama"])
    args = arguments(tiny.run_in(tmp_path / "ours", "sft"), settings)
    ours = Engine(model, args, NLL(), OursInOrder(examples, args))
    ours.train()
    of_theirs, of_ours = (
        [line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (theirs, ours)
    )
    assert len(of_ours) == 8 and of_ours == pytest.approx(of_theirs, abs=1e-4)
