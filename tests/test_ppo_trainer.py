"""PPO on tiny models: the first step, the exact steps, what ends an update, resume, and learning."""

import json

import pytest
import torch
from torch import nn

from annotate.records import read
from reward.batch import Example
from reward.model import load_policy, new_reward_model, save, without_gradient
from reward.tokens import logprobs
from stages import ppo
from stages.config import UserError
from stages.engine import Engine, Reporting, train
from stages.manifest import load_manifest
from stages.ppo_trainer import PPO, PPOConfig, RatioGuard, Rollout, Rollouts
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


class Counts(nn.Module):
    """A reward model whose score is how often one token occurs."""

    def __init__(self, token, pad):
        super().__init__()
        self.token, self.score = token, nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.score.weight)
        self.config = type("Config", (), {"pad_token_id": pad})()

    def base_model(self, input_ids, attention_mask, use_cache):
        count = ((input_ids == self.token) & (attention_mask == 1)).cumsum(1)
        return type("Output", (), {"last_hidden_state": count[..., None].float()})()


class Setting:
    """Everything that `ppo.main` puts together, open to look into."""

    def __init__(self, path, reward=None, seed=0, prompts=10, callbacks=(), **trainer):
        self.run = tiny.run_in(path, "ppo", seed)
        self.policy, self.tokenizer = load_policy(tiny.save_folder(path, "llama"))
        self.reference = without_gradient(self.policy)
        self.policy.value_head = nn.Linear(16, 1)
        nn.init.zeros_(self.policy.value_head.weight)
        nn.init.zeros_(self.policy.value_head.bias)
        self.args = ppo.ppo_arguments(SMALL | trainer, self.run)
        self.objective = PPO(self.args)
        if reward is None:
            torch.manual_seed(5)
            reward = new_reward_model(path / "llama")[0]
        rows = tiny.records(prompts, "policy", completion=False)
        self.rollouts = Rollouts(
            self.policy, self.reference, reward, self.tokenizer, rows, self.objective, self.run
        )
        hooks = [Reporting(self.run, "PPO"), *callbacks]
        if self.args.ratio_threshold is not None:
            hooks.append(RatioGuard(self.objective, self.args.ratio_threshold))
        self.engine = Engine(self.policy, self.args, self.objective, self.rollouts, hooks)

    def train(self):
        train(self.engine, self.run)
        return [json.loads(line) for line in (self.run.path / "metrics.jsonl").read_text().splitlines()]


def test_first_minibatch_has_ratio_1_and_no_kl(tmp_path):
    lines = Setting(tmp_path).train()
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["approx_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["clip_fraction"] == 0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy still is the reference
    assert lines[1]["approx_kl"] > 1e-7
    for line in lines[::4]:  # every update begins at the policy that sampled
        assert line["ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [({}, 12), ({"num_ppo_epochs": 3, "num_mini_batches": 1}, 18), ({"total_episodes": 31}, 12)],
)
def test_exact_number_of_optimiser_steps(tmp_path, trainer, steps):
    """Updates x epochs x minibatches, also where passes over the 10 prompts end inside a rollout."""
    setting = Setting(tmp_path, **trainer)
    setting.train()
    taken = {int(state["step"]) for state in setting.engine.optimizer.state.values()}
    assert (setting.engine.state.global_step, taken, len(setting.rollouts)) == (steps, {steps}, steps)


def test_every_reply_is_in_each_epoch_once(tmp_path):
    setting = Setting(tmp_path)
    batches = list(setting.rollouts.start(0))  # nothing trains in between
    for update in range(3):
        of_update = batches[4 * update : 4 * update + 4]
        assert [len(batch) for batch in of_update] == [4] * 4
        epochs = [of_update[:2], of_update[2:]]
        first, second = ({id(e) for batch in epoch for e in batch} for epoch in epochs)
        assert first == second and len(first) == 8
        assert [id(e) for e in of_update[0]] != [id(e) for e in of_update[2]]


def test_prompts_are_drawn_in_passes(tmp_path):
    setting = Setting(tmp_path, total_episodes=40)
    drawn = [row for update in range(5) for row in setting.rollouts._draw_prompts(update)]
    for start in range(0, 40, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_experience_is_what_the_models_say(tmp_path):
    """Old log-probs, KL, rewards and returns recomputed from plain forwards of each reply."""
    setting = Setting(tmp_path, gamma=1.0, lam=1.0, kl_coef=0.3, missing_eos_penalty=0.7)
    with torch.no_grad():
        for p in setting.policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    experience = setting.rollouts.rollout(0)
    rows = read(setting.run.path / "rollouts/000000.jsonl", Rollout)
    plain = [Example(e.prompt, e.completions) for e in experience]
    of_policy, of_reference = logprobs(setting.policy, plain), logprobs(setting.reference, plain)
    for e, row, (logp,), (ref,) in zip(experience, rows, of_policy, of_reference, strict=True):
        assert e.old_logps == pytest.approx(logp, abs=1e-5)
        kl = [a - b for a, b in zip(logp, ref, strict=True)]
        assert row.kl == pytest.approx(sum(kl), abs=1e-4) and row.length == len(logp)
        assert row.stopped == (e.completions[0][-1] == setting.tokenizer.eos_token_id)
        score = row.reward - 0.7 * (not row.stopped)
        returns = [score - 0.3 * sum(kl[t:]) for t in range(len(kl))]  # gamma = lambda = 1
        assert e.returns == pytest.approx(returns, abs=1e-4)
    advantages = torch.tensor([a for e in experience for a in e.advantages])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_reference_and_the_reward_model_stay(tmp_path):
    setting = Setting(tmp_path)
    before = {k: v.clone() for k, v in setting.reference.state_dict().items()}
    scorer = {k: v.clone() for k, v in setting.rollouts.reward.state_dict().items()}
    setting.train()
    assert all(torch.equal(v, before[k]) for k, v in setting.reference.state_dict().items())
    assert all(torch.equal(v, scorer[k]) for k, v in setting.rollouts.reward.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in setting.policy.state_dict().items() if k in before)


def test_loss_does_not_depend_on_the_micro_batches(tmp_path):
    lines = {}
    for budget in (8192, 30):
        setting = Setting(tmp_path / str(budget), total_episodes=8, optim="sgd")
        setting.engine.max_tokens = budget
        lines[budget] = setting.train()
    for a, b in zip(lines[8192], lines[30], strict=True):
        for name in ("loss", "policy_loss", "value_loss", "approx_kl", "ratio", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


def test_loss_by_hand(tmp_path):
    """The mean over all tokens of the step, not over replies."""
    setting = Setting(tmp_path, vf_coef=0.5, cliprange_value=None)
    batch = setting.rollouts.rollout(0)[:3]
    weight = setting.objective.weight(batch)
    loss, _ = setting.objective.loss(setting.policy, batch)
    advantages = [a for e in batch for a in e.advantages]
    returns = [r for e in batch for r in e.returns]  # values are 0 and the ratio is 1 at first
    expected = sum(-a for a in advantages) + 0.5 * sum(0.5 * r * r for r in returns)
    assert weight == len(advantages) and loss.item() == pytest.approx(expected, rel=1e-4)


def test_target_kl_ends_an_update_early(tmp_path):
    """The first step always runs; once it has moved too far, the rest of the update is skipped."""
    setting = Setting(tmp_path, target_kl=1e-9, learning_rate=1e-2)
    lines = setting.train()
    assert setting.engine.state.global_step == 12
    steps = {int(state["step"]) for state in setting.engine.optimizer.state.values()}
    assert steps == {6}  # of each update of four steps: the one that moves, the one that notices
    assert [line["loss"] == 0 for line in lines] == [False, False, True, True] * 3


def test_ratio_guard_skips_the_step(tmp_path):
    """A threshold below 1 skips every step: nothing moves."""
    setting = Setting(tmp_path, ratio_threshold=0.5)
    setting.train()
    assert tiny.same_weights(setting.reference, without_value_head(setting.policy))
    generous = Setting(tmp_path / "generous", ratio_threshold=1e6)
    generous.train()
    assert not tiny.same_weights(generous.reference, without_value_head(generous.policy))


def without_value_head(policy):
    del policy.value_head
    return policy


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_say_a_token(tmp_path, seed):
    """Reward = how often token 77 occurs; it is rare at first."""
    setting = Setting(
        tmp_path,
        Counts(77, 0),
        seed,
        total_episodes=40 * 32,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        kl_coef=0.01,
        missing_eos_penalty=None,
        logging_steps=4,
    )
    lines = setting.train()
    reward = [line["reward"] for line in lines]
    assert sum(reward[:3]) / 3 < 0.5 and sum(reward[-3:]) / 3 > 2
    assert lines[-1]["kl"] > 1 and lines[-1]["entropy"] < lines[0]["entropy"]


def test_a_high_price_of_kl_holds_the_policy(tmp_path):
    def last_kl(name, **trainer):
        trainer |= {"total_episodes": 15 * 32, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
        lines = Setting(tmp_path / name, Counts(77, 0), **trainer).train()
        return sum(line["kl"] for line in lines[-20:]) / 20

    assert last_kl("dear", kl_coef=2.0) < last_kl("cheap", kl_coef=0.0) / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"total_episodes": 7}, "less than one rollout"), ({"missing_eos_mode": "drop"}, "subtract or replace")],
)
def test_settings_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), **SMALL | settings)


# The stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    policy = tiny.save_folder(folder, "llama")
    torch.manual_seed(0)
    save(*new_reward_model(policy), folder / "rm")
    prompts = tiny.rows_file(folder / "records.jsonl", tiny.records(10, "policy", completion=False))
    return {"policy": str(policy), "reward": str(folder / "rm"), "prompts": prompts}


def stage(path, inputs, **trainer):
    run = tiny.run_in(path, "ppo")
    ppo.main(ppo.Config(**inputs, trainer=SMALL | {"save_steps": 4} | trainer), run)
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
    real = Rollouts.rollout

    def interrupted(self, update):
        if update == stop:
            raise KeyboardInterrupt
        return real(self, update)

    def interrupted_at_the_end(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop < 3:
            patch.setattr(Rollouts, "rollout", interrupted)
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
