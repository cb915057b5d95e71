"""PPO on tiny models: the first step, the exact steps, what ends an update, resume, and learning."""

import pytest
import torch
from transformers import TrainerCallback

from reward.batch import Example
from reward.functions import RewardError
from reward.model import load_policy, new_reward_model
from reward.tokens import logprobs
from stages.ppo_trainer import PPOConfig, PPOTrainer
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
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}  # rollouts of 8 replies, 3 updates of 4 steps
PROMPTS = [f"My {tiny.WORDS[i % 8]} number {i} broke." for i in range(10)]


def rows(prompts=PROMPTS):
    return [{"prompt": [{"role": "user", "content": text}]} for text in prompts]


def count_77(completion_ids, **_):
    return [float(ids.count(77)) for ids in completion_ids]


def setting(path, reward=None, prompts=PROMPTS, callbacks=None, kind=PPOTrainer, given=None, **args):
    """A trainer of the tiny Llama, against a random reward model unless a function is given."""
    folder = path / "llama"
    if not folder.exists():
        tiny.save_folder(path, "llama")
    policy, tokenizer = load_policy(folder)
    if reward is None:
        torch.manual_seed(5)
        reward = new_reward_model(folder)[0]
    config = PPOConfig(str(path / "out"), **SMALL | args)
    return kind(
        policy,
        reward,
        config,
        rows(prompts),
        processing_class=tokenizer,
        reward_processing_classes=None if callable(reward) and not hasattr(reward, "config") else tokenizer,
        callbacks=callbacks,
        **given or {},
    )


def logs(trainer):
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_first_minibatch_has_ratio_1_and_no_kl(tmp_path):
    lines = logs(setting(tmp_path))
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["approx_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["clip_fraction"] == 0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy still is the reference
    assert lines[1]["approx_kl"] > 1e-7
    for line in lines[::4]:  # every update begins at the policy that sampled
        assert line["ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("args", "steps"),
    [({}, 12), ({"num_ppo_epochs": 3, "num_mini_batches": 1}, 18), ({"total_episodes": 31}, 12)],
)
def test_exact_number_of_optimiser_steps(tmp_path, args, steps):
    """Updates x epochs x minibatches, also where passes over the 10 prompts end inside a rollout."""
    trainer = setting(tmp_path, **args)
    trainer.train()
    taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert (trainer.state.global_step, taken, len(trainer.steps)) == (steps, {steps}, steps)


def test_fewer_prompts_than_a_batch(tmp_path):
    trainer = setting(tmp_path, prompts=PROMPTS[:3])
    trainer.train()
    assert trainer.state.global_step == 12


def test_every_reply_is_in_each_epoch_once(tmp_path):
    batches = list(setting(tmp_path).steps.start(0))  # nothing trains in between
    for update in range(3):
        of_update = batches[4 * update : 4 * update + 4]
        assert [len(batch) for batch in of_update] == [4] * 4
        epochs = [of_update[:2], of_update[2:]]
        first, second = ({id(e) for batch in epoch for e in batch} for epoch in epochs)
        assert first == second and len(first) == 8
        assert [id(e) for e in of_update[0]] != [id(e) for e in of_update[2]]


def test_prompts_are_drawn_in_passes(tmp_path):
    trainer = setting(tmp_path, total_episodes=40)
    drawn = []
    for trainer.done in range(5):
        drawn += trainer._next_rows()
    for start in range(0, 40, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_experience_is_what_the_models_say(tmp_path):
    """Log-probs, values, KL, rewards and returns recomputed from plain forwards of each reply."""
    trainer = setting(tmp_path, gamma=1.0, lam=1.0, kl_coef=0.3, missing_eos_penalty=0.7)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    replies = trainer.rollout()
    scores = trainer.score(replies)
    experience = trainer._experience(replies, scores)
    plain = [Example(e.prompt, e.completions) for e in experience]
    of_policy = logprobs(trainer.model, plain)
    of_reference = logprobs(trainer.actor.reference.model, plain)
    stop = trainer.processing_class.eos_token_id
    for i, (e, (logp,), (ref,)) in enumerate(zip(experience, of_policy, of_reference, strict=True)):
        assert e.old_logps == pytest.approx(logp, abs=1e-5)
        kl = [a - b for a, b in zip(logp, ref, strict=True)]
        assert replies.kl[i] == pytest.approx(sum(kl), abs=1e-4)
        assert replies.samples[i].stopped == (e.completions[0][-1] == stop)
        score = scores.totals[i] - 0.7 * (not replies.samples[i].stopped)
        returns = [score - 0.3 * sum(kl[t:]) for t in range(len(kl))]  # gamma = lambda = 1
        assert e.returns == pytest.approx(returns, abs=1e-4)
    advantages = torch.tensor([a for e in experience for a in e.advantages])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_reference_and_the_reward_model_stay(tmp_path):
    torch.manual_seed(5)
    tiny.save_folder(tmp_path, "llama")
    reward = new_reward_model(tmp_path / "llama")[0]
    scorer = {k: v.clone() for k, v in reward.state_dict().items()}
    trainer = setting(tmp_path, reward)
    before = {k: v.clone() for k, v in trainer.actor.reference.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in trainer.actor.reference.model.state_dict().items())
    assert all(torch.equal(v, scorer[k]) for k, v in reward.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items() if k in before)


def test_loss_does_not_depend_on_the_micro_batches(tmp_path):
    lines = {}
    for budget in (8192, 30):
        trainer = setting(tmp_path, total_episodes=8, optim="sgd")
        trainer.max_tokens = budget
        lines[budget] = logs(trainer)
    for a, b in zip(lines[8192], lines[30], strict=True):
        for name in ("loss", "policy_loss", "value_loss", "approx_kl", "ratio", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)


def test_loss_by_hand(tmp_path):
    """The mean over all tokens of the step, not over replies."""
    trainer = setting(tmp_path, vf_coef=0.5, cliprange_value=None)
    replies = trainer.rollout()
    batch = trainer._experience(replies, trainer.score(replies))[:3]
    weight = trainer.objective.weight(batch)
    loss, _ = trainer.objective.loss(trainer.model, batch)
    advantages = [a for e in batch for a in e.advantages]
    returns = [r for e in batch for r in e.returns]  # values are 0 and the ratio is 1 at first
    expected = sum(-a for a in advantages) + 0.5 * sum(0.5 * r * r for r in returns)
    assert weight == len(advantages) and loss.item() == pytest.approx(expected, rel=1e-4)


def test_target_kl_ends_an_update_early(tmp_path):
    """The first step always runs; once it has moved too far, the rest of the update is skipped."""
    trainer = setting(tmp_path, target_kl=1e-9, learning_rate=1e-2)
    lines = logs(trainer)
    assert trainer.state.global_step == 12
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {6}  # of each update of four steps: the one that moves, the one that notices
    assert [line["loss"] == 0 for line in lines] == [False, False, True, True] * 3


def test_ratio_threshold_skips_the_step(tmp_path):
    """A threshold below 1 skips every step: nothing moves."""

    def moved(threshold):
        trainer = setting(tmp_path, ratio_threshold=threshold)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
        return any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())

    assert not moved(0.5) and moved(1e6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_say_a_token(tmp_path, seed):
    """Reward = how often token 77 occurs; it is rare at first."""
    lines = logs(
        setting(
            tmp_path,
            count_77,
            seed=seed,
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
    )
    reward = [line["reward"] for line in lines]
    assert sum(reward[:3]) / 3 < 0.5 and sum(reward[-3:]) / 3 > 2
    assert lines[-1]["kl"] > 1 and lines[-1]["entropy"] < lines[0]["entropy"]


def test_a_high_price_of_kl_holds_the_policy(tmp_path):
    def last_kl(**args):
        args |= {"total_episodes": 15 * 32, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
        return sum(line["kl"] for line in logs(setting(tmp_path, count_77, **args))[-20:]) / 20

    assert last_kl(kl_coef=2.0) < last_kl(kl_coef=0.0) / 2


def test_kl_is_steered_to_its_target(tmp_path):
    """Far above the target the price rises by at most a fifth of episodes / horizon; below it falls."""
    args = {"kl_horizon": 40, "learning_rate": 1e-2, "kl_coef": 0.1}
    high = logs(setting(tmp_path, count_77, kl_target=1e-3, **args))
    assert [line["kl_coef"] for line in high[3::4]] == pytest.approx([0.1, 0.096, 0.09984], rel=1e-6)
    low = logs(setting(tmp_path, count_77, kl_target=1e6, **args))
    assert [line["kl_coef"] for line in low[3::4]] == pytest.approx([0.1 * 0.96**i for i in range(3)])


def test_scores_are_brought_to_mean_0_and_deviation_1(tmp_path):
    """Those of single tokens with their reply's sum; the log keeps the raw score."""

    def hundreds(completion_ids):
        return [[100.0 + i] + [0.0] * (len(ids) - 1) for i, ids in enumerate(completion_ids)]

    args = {"lam": 1.0, "kl_coef": 0.0, "missing_eos_penalty": None, "scale_rewards": True}
    trainer = setting(tmp_path, hundreds, **args)
    replies = trainer.rollout()
    returns = torch.tensor([e.returns[0] for e in trainer._experience(replies, trainer.score(replies))])
    assert returns.mean().item() == pytest.approx(0, abs=1e-4)
    assert returns.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert trainer.steps.metrics["reward"] == pytest.approx(103.5)


class Interrupt(TrainerCallback):
    """As if killed once a step is saved."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


FEATURES = {
    "plain": {},
    "steered and scaled": {"kl_target": 0.5, "kl_horizon": 50, "scale_rewards": True},
    "value of its own": {"value_init": "reward", "value_learning_rate": 1e-2},
    "last layer": {"train_layers": "last:1"},
    "adapters": {},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_resumed_is_bitwise_uninterrupted(tmp_path, feature):
    """Policy, value, optimiser, price of KL, scale of the reward and the order of prompts."""
    import peft

    args = {"save_strategy": "steps", "save_steps": 4} | FEATURES[feature]
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")

    def trainer(**more):
        torch.manual_seed(0)
        return setting(
            tmp_path, given={"peft_config": config if feature == "adapters" else None}, **args | more
        )

    straight = trainer()
    straight.train()
    cut = trainer(callbacks=[Interrupt(8)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))
    assert tiny.same_weights(straight.model, resumed.model)
    history = [
        [
            {k: v for k, v in line.items() if not k.startswith(("seconds/", "memory/", "epoch"))}
            for line in lines
        ]
        for lines in (straight.state.log_history[:-1], resumed.state.log_history[:-1])
    ]
    assert history[0] == history[1]


def test_a_loop_of_ones_own_is_what_train_does(tmp_path):
    whole = setting(tmp_path)
    whole.train()
    trainer, metrics = setting(tmp_path), []
    for _ in range(trainer.args.updates):
        replies = trainer.rollout()
        scores = trainer.score(replies)
        metrics.append(trainer.update(replies, scores))
    assert tiny.same_weights(whole.model, trainer.model)
    lines = [line for line in whole.state.log_history if "loss" in line]
    assert [m["reward"] for m in metrics] == [line["reward"] for line in lines[3::4]]


def test_a_reward_that_fails_leaves_a_checkpoint(tmp_path):
    """It names the function; training goes on from there once it is mended."""
    calls = []

    def absent_minded(completions, **_):
        calls.append(len(completions))
        if len(calls) == 2:
            raise RuntimeError("no judge at home")
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"absent_minded.*no judge at home"):
        setting(tmp_path, absent_minded, save_strategy="steps", save_steps=1000).train()
    resumed = setting(tmp_path, count_77)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert resumed.state.global_step == 12


def test_evaluation_answers_the_held_out_prompts(tmp_path):
    held_out = [{"prompt": "A lamp broke."}, {"prompt": "A pan."}]
    args = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = setting(tmp_path, count_77, given={"eval_dataset": held_out}, **args)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_reward" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert trainer.evaluate()["eval_reward"] == lines[-1]["eval_reward"]  # the same draws
    assert {"eval_kl", "eval_length", "eval_self_stopping"} <= lines[0].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_episodes": 7}, "less than one rollout"),
        ({"missing_eos_mode": "drop"}, "subtract or replace"),
        ({"kl_estimator": "k3"}, "only k1 can stand in the reward"),
        ({"temperature": 0.0}, "above 0"),
        ({"dual_clip": 0.5}, "above 1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), **SMALL | settings)
