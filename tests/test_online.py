"""RLOO and GRPO on tiny models: tokens, replies without end, the budget, resume, learning."""

import json
import math

import pytest
import torch

from reward.batch import Example
from reward.model import load_policy, load_reward, new_reward_model, save
from reward.tokens import prompt_ids, rewards
from stages import grpo, online, rloo
from stages.config import UserError
from tests import tiny

STAGES = {"rloo": rloo, "grpo": grpo}
SMALL = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_generations": 2,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 2,
}  # two rounds of 8 replies, 2 steps each


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    policy = tiny.save_folder(folder, "llama")
    torch.manual_seed(0)
    save(*new_reward_model(policy), folder / "rm")
    prompts = tiny.rows_file(folder / "records.jsonl", tiny.records(20, "policy", completion=False))
    return {"policy": str(policy), "reward": str(folder / "rm"), "prompts": prompts}


def stage(path, name, inputs, seed=0, settings=None, **trainer):
    run = tiny.run_in(path, name, seed)
    module = STAGES[name]
    module.main(module.Config(**inputs, **settings or {}, trainer=SMALL | trainer), run)
    return run


def logged(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "step_time"} for line in lines]


@pytest.mark.parametrize("name", STAGES)
def test_stage_trains_on_our_tokens_and_writes_a_policy(tmp_path, inputs, name, monkeypatch):
    """What is scored is what TRL sampled, and what it sampled from is the prompt as rendered elsewhere."""
    from trl import GRPOTrainer, RLOOTrainer

    generated, scored = [], []
    for kind in (RLOOTrainer, GRPOTrainer):
        real = kind._generate_single_turn

        def spy(self, ids, *args, real=real, **kwargs):
            made = real(self, ids, *args, **kwargs)
            generated.extend(zip(ids, made if name == "rloo" else made[0], strict=True))
            return made

        monkeypatch.setattr(kind, "_generate_single_turn", spy)
    call = online.Scorer.__call__

    def seen(self, **given):
        scored.extend(zip(given["ids"], given["completion_ids"], strict=True))
        return call(self, **given)

    monkeypatch.setattr(online.Scorer, "__call__", seen)
    run = stage(tmp_path, name, inputs)
    assert scored == generated and len(scored) == 16 == run.manifest.metrics["replies"]
    policy, tokenizer = load_policy(tmp_path / "model")
    known = [prompt_ids(tokenizer, record.prompt) for record in tiny.records(20)]
    assert all(prompt in known for prompt, _ in scored)
    assert all(prompt == other for (prompt, _), (other, _) in zip(scored[::2], scored[1::2], strict=True))
    assert not tiny.same_weights(policy, load_policy(inputs["policy"])[0])
    assert run.manifest.metrics["optimiser_steps"] == 4 and "stops by itself" in run.manifest.gates
    assert [line["step"] for line in logged(tmp_path)] == [2, 4]
    assert {"score", "self_stopping", "reward", "kl"} <= logged(tmp_path)[0].keys()


def test_score_is_the_reward_models_and_an_endless_reply_pays(inputs):
    model, tokenizer = load_reward(inputs["reward"])
    prompt = prompt_ids(tokenizer, tiny.records(1)[0].prompt)
    ended, cut = [5, 6, tokenizer.eos_token_id], [5, 6, 7]
    (plain,) = rewards(model, [Example(prompt, (ended, cut))])
    metrics = {}
    for mode, expected in (("subtract", plain[1] - 2.0), ("replace", -2.0)):
        settings = online.Settings(**inputs, missing_eos_penalty=2.0, missing_eos_mode=mode)
        found = online.Scorer(model, tokenizer, settings)(
            ids=[prompt, prompt], completion_ids=[ended, cut], log_metric=metrics.__setitem__, prompts=[]
        )
        assert found == pytest.approx([plain[0], expected])
    assert metrics == {"score": pytest.approx(sum(plain) / 2), "self_stopping": 0.5}


@pytest.mark.parametrize(("name", "stop"), [("rloo", 3), ("grpo", 3), ("rloo", 13)])
def test_resumed_is_bitwise_uninterrupted(tmp_path, inputs, name, stop, monkeypatch):
    """A pass over the prompts has 10 steps: the last case is stopped in the second."""
    from stages.engine import Reporting

    steps = {"max_steps": stop + 1}
    stage(tmp_path / "straight", name, inputs, **steps)
    real = Reporting.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporting, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", name, inputs, **steps)
    assert (tmp_path / f"cut/checkpoints/checkpoint-{stop - 1}/complete").exists()
    torch.manual_seed(9)  # a new process begins elsewhere
    stage(tmp_path / "cut", name, inputs, **steps)
    weights = "model/model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert logged(tmp_path / "cut") == logged(tmp_path / "straight")


def test_the_reference_is_the_policy_even_where_a_pad_token_was_added(tmp_path, monkeypatch):
    from stages import engine

    policy = tiny.save_folder(tmp_path, "no_pad")
    save(*new_reward_model(policy), tmp_path / "rm")
    prompts = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(4, "policy", completion=False))
    seen = []
    real = engine.train

    def look(trainer, run):
        seen.append(tiny.same_weights(trainer.ref_model, trainer.model))
        real(trainer, run)

    monkeypatch.setattr(engine, "train", look)
    given = {"policy": str(policy), "reward": str(tmp_path / "rm"), "prompts": prompts}
    stage(tmp_path / "run", "rloo", given, max_steps=2)
    assert seen == [True]
    assert abs(logged(tmp_path / "run")[0]["kl"]) < 1e-5


@pytest.mark.parametrize("name", STAGES)
def test_it_learns_what_is_rewarded(tmp_path, inputs, name, monkeypatch):
    """Here: tokens of small ids."""

    def small(model, examples):
        return [[sum(t < 150 for t in reply) / len(reply) for reply in e.completions] for e in examples]

    monkeypatch.setattr("reward.tokens.rewards", small)
    wide = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "num_generations": 4, "beta": 0.0}
    steps = {"max_steps": 20, "learning_rate": 3e-2, "logging_steps": 1, "save_steps": 20}
    run = stage(tmp_path, name, inputs, settings={"missing_eos_penalty": None}, **wide, **steps)
    scores = [line["score"] for line in logged(tmp_path)]
    assert sum(scores[-3:]) / 3 > 0.2 + sum(scores[:3]) / 3
    assert run.manifest.metrics["replies"] == 320


@pytest.mark.parametrize(
    ("trainer", "replies"),
    [
        ({"per_device_train_batch_size": 24, "steps_per_generation": 4, "num_iterations": 4}, 5760),
        ({"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2, "num_iterations": 2}, 11520),
        ({"per_device_train_batch_size": 6}, 5760),
    ],
)
def test_the_budget_of_replies_can_be_told_from_the_settings(tmp_path, trainer, replies):
    """The first is the quickstart's PPO: 960 steps, rounds of 96 replies, four passes over each."""
    from trl import RLOOConfig

    args = online.online_arguments(trainer, tiny.run_in(tmp_path, "rloo"), RLOOConfig, {})
    assert online.sampled(args, 960) == replies
    assert args.save_steps == 10 * args.logging_steps


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"temperature": 0.7}, "rloo.trainer.temperature: replies are drawn at temperature 1"),
        ({"top_k": 50}, "rloo.trainer.top_k: replies are drawn"),
        ({"save_steps": 3}, "multiple of the 2 optimiser steps of one round"),
        ({"max_completion_length": 120}, r"a prompt of \d+ tokens and a reply of 120 do not fit the 128"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, inputs, trainer, message):
    with pytest.raises(UserError, match=message) as error:
        stage(tmp_path, "rloo", inputs, **trainer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", STAGES)
def test_models_and_prompts_that_do_not_go_together(tmp_path, inputs, name):
    other = tiny.save_folder(tmp_path, "no_template")
    save(*new_reward_model(other), tmp_path / "rm")
    with pytest.raises(UserError, match="another vocabulary than the policy"):
        stage(tmp_path / "run", name, inputs | {"reward": str(tmp_path / "rm")})
    with pytest.raises(ValueError, match="not a reward model"):
        stage(tmp_path / "run", name, inputs | {"reward": inputs["policy"]})
    prompts = tiny.rows_file(tmp_path / "records.jsonl", tiny.records(3, "sft"))
    with pytest.raises(UserError, match="no prompt of use `policy` in the training split"):
        stage(tmp_path / "run", name, inputs | {"prompts": prompts})


def test_grpo_holds_to_the_reference_unless_told_otherwise(tmp_path, inputs):
    run = stage(tmp_path, "grpo", inputs, max_steps=2)
    assert math.isfinite(logged(tmp_path)[0]["kl"]) and run.manifest.metrics["replies"] == 8
