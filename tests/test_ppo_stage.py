"""The stage that trains by PPO: what it reads, writes, refuses, and continues."""

import pytest
import torch

from annotate.records import read
from reward.model import load_policy, new_reward_model, save
from stages import ppo
from stages.config import UserError
from stages.manifest import load_manifest
from stages.ppo_rollout import Rollout
from stages.ppo_trainer import PPOTrainer
from tests import tiny

SMALL = {
    "total_episodes": 24,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
}  # rollouts of 8 replies, 3 updates of 4 steps


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    policy = tiny.save_folder(folder, "llama")
    torch.manual_seed(0)
    save(*new_reward_model(policy), folder / "rm")
    prompts = tiny.rows_file(folder / "records.jsonl", tiny.records(10, "policy", completion=False))
    return {"policy": str(policy), "reward": str(folder / "rm"), "prompts": prompts}


def stage(path, inputs, peft=None, **trainer):
    run = tiny.run_in(path, "ppo")
    ppo.main(ppo.Config(**inputs, peft=peft, trainer=SMALL | {"save_steps": 4} | trainer), run)
    run.manifest.save(path)
    return run


def test_stage_writes_a_policy_and_every_reply(tmp_path, inputs):
    run = stage(tmp_path, inputs)
    rows = read(tmp_path / "rollouts.jsonl", Rollout)
    assert [row.step for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert all(row.length <= 8 for row in rows)
    facts = load_manifest(tmp_path).metrics
    assert (facts["updates"], facts["optimiser_steps"]) == (3, 12)
    assert facts["reward"] == pytest.approx(sum(r.reward for r in rows[16:]) / 8)
    assert facts["kl"] == pytest.approx(sum(r.kl for r in rows[16:]) / 8)
    policy, _ = load_policy(tmp_path / "model")
    assert not tiny.same_weights(policy, load_policy(inputs["policy"])[0])
    assert not hasattr(policy, "value_head") and not (tmp_path / "rollouts").exists()
    assert "stops by itself" in run.manifest.gates


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resumed_is_bitwise_uninterrupted(tmp_path, inputs, monkeypatch, stop):
    """Stopped as update `stop` begins; 3: after the last."""
    stage(tmp_path / "straight", inputs)
    real = PPOTrainer.rollout

    def interrupted(self):
        if self.done == stop:
            raise KeyboardInterrupt
        return real(self)

    def interrupted_at_the_end(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop < 3:
            patch.setattr(PPOTrainer, "rollout", interrupted)
        else:  # the last checkpoint is written, and nothing after it
            patch.setattr("stages.engine.Reporting.on_train_end", interrupted_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", inputs)
    stage(tmp_path / "cut", inputs)
    for name in ("model/model.safetensors", "rollouts.jsonl", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    straight, cut = (load_manifest(tmp_path / name) for name in ("straight", "cut"))
    assert straight.metrics == cut.metrics and straight.gates == cut.gates


def test_another_vocabulary_is_refused(tmp_path, inputs):
    other = tiny.save_folder(tmp_path, "no_template")
    save(*new_reward_model(other), tmp_path / "rm")
    with pytest.raises(UserError, match="another vocabulary than the policy") as error:
        stage(tmp_path / "run", inputs | {"reward": str(tmp_path / "rm")})
    assert "\n" not in str(error.value)


def test_a_policy_in_the_place_of_the_reward_model_is_refused(tmp_path, inputs):
    with pytest.raises(ValueError, match="not a reward model: give the model of an rm run"):
        stage(tmp_path / "run", inputs | {"reward": inputs["policy"]})


def test_no_prompt_to_answer(tmp_path, inputs):
    prompts = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(3, "sft"))
    with pytest.raises(UserError, match="no prompt of use `policy` in the training split"):
        stage(tmp_path / "run", inputs | {"prompts": prompts})


def test_a_checkpoint_within_an_update_cannot_be_asked_for(tmp_path, inputs):
    with pytest.raises(UserError, match="multiple of the 4 optimiser steps of one update"):
        stage(tmp_path / "run", inputs, save_steps=6)


def test_adapters_are_merged_into_the_policy(tmp_path, inputs):
    stage(tmp_path, inputs, peft={"r": 4})
    before, after = (load_policy(path)[0].state_dict() for path in (inputs["policy"], tmp_path / "model"))
    assert before.keys() == after.keys()
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
