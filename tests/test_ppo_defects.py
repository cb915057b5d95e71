"""What TRL 1.12's PPOTrainer got wrong or could not do, and this one does. Its issues are named by number."""

import math

import peft
import pytest
import torch
from torch import nn

from reward.batch import Example
from reward.model import load_policy, new_reward_model
from reward.tokens import batch_of, forward
from stages.ppo_math import token_rewards
from stages.ppo_trainer import PPOConfig, PPOTrainer
from tests import tiny
from tests.test_ppo_trainer import SMALL, count_77, logs, rows, setting


def test_every_minibatch_is_a_step_on_every_update(tmp_path):
    """#5645: num_mini_batches did nothing; and the last batch of a pass stepped on every micro-batch."""
    trainer = setting(tmp_path, prompts=[f"number {i}" for i in range(12)], total_episodes=40)  # 1.5 rollouts
    steps = []
    for _ in range(trainer.args.updates):
        before = trainer.state.global_step
        replies = trainer.rollout()
        trainer.update(replies, trainer.score(replies))
        taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
        assert taken == {trainer.state.global_step}
        steps.append(trainer.state.global_step - before)
    assert steps == [4] * 5


def test_metrics_are_means_over_tokens(tmp_path):
    """They were averaged over arrays of mostly zeros, padding counted."""
    trainer = setting(tmp_path, response_length=12)
    replies = trainer.rollout()
    experience = trainer._experience(replies, trainer.score(replies))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        weight = trainer.objective.weight(experience)
        _, metrics = trainer.objective.loss(trainer.model, experience)
    ratios, squares = [], []
    for e in experience:
        ids = torch.tensor([e.prompt + e.completions[0]])
        logp = trainer.model(input_ids=ids).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
        new = logp.gather(1, torch.tensor(e.completions[0])[:, None]).squeeze(1).tolist()
        ratios += [math.exp(a - b) for a, b in zip(new, e.old_logps, strict=True)]
        squares += [0.5 * (a - b) ** 2 for a, b in zip(new, e.old_logps, strict=True)]
    assert float(metrics["ratio"]) / weight == pytest.approx(sum(ratios) / len(ratios), abs=1e-5)
    assert float(metrics["approx_kl"]) / weight == pytest.approx(sum(squares) / len(squares), abs=1e-6)
    clipped = sum(abs(r - 1) > 0.2 for r in ratios) / len(ratios)
    assert float(metrics["clip_fraction"]) / weight == pytest.approx(clipped, abs=1e-6) and clipped > 0


def test_gradients_are_clipped(tmp_path):
    """max_grad_norm was ignored: with SGD the step is then as long as the gradient."""

    def longest(limit):
        trainer = setting(
            tmp_path,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=limit,
            total_episodes=8,
            num_ppo_epochs=1,
            num_mini_batches=1,
            gradient_accumulation_steps=4,
        )
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        trainer.train()
        after = trainer.model.state_dict()
        return math.sqrt(sum(float(((after[k] - v) ** 2).sum()) for k, v in before.items()))

    assert longest(1e-3) == pytest.approx(1e-3, rel=1e-3) and longest(1e3) > 0.1


def test_activations_are_checkpointed_when_asked(tmp_path):
    """gradient_checkpointing was ignored. Active, a layer runs again in backward, to the same weights, but
    for rounding: without it the last layer works where it is read alone."""

    def trained(on):
        trainer, calls = setting(tmp_path, activation_checkpointing=on), []
        inside = trainer.training_step

        def counted(*args, **kwargs):
            hook = trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            try:
                return inside(*args, **kwargs)
            finally:
                hook.remove()

        trainer.training_step = counted
        trainer.train()
        return trainer.model, len(calls)

    (plain, once), (checkpointed, twice) = trained(False), trained(True)
    assert twice == 2 * once
    for of_plain, of_checkpointed in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(of_plain, of_checkpointed, atol=1e-5, rtol=0)


def test_bf16_is_honoured(tmp_path):
    """The setting reaches the forward pass; log-probabilities are then computed as training computes them."""
    trainer, seen = setting(tmp_path, count_77, bf16=True, is_correction="tis"), []
    hook = trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, given, output: seen.append(output.dtype)
    )
    lines = logs(trainer)
    hook.remove()
    assert torch.bfloat16 in seen
    assert lines[0]["ratio"] == pytest.approx(1, abs=0.02) and abs(lines[0]["sampling_kl"]) < 0.03


def test_the_penalty_looks_for_the_stop_token(tmp_path):
    """#3750: replies that ended by the stop token were penalised when it was not the model's eos."""
    tiny.save_folder(tmp_path, "llama")
    policy, tokenizer = load_policy(tmp_path / "llama")
    policy.config.eos_token_id = 7  # the tokenizer, which rendered the training data, says otherwise
    head = nn.Linear(16, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(policy.lm_head.weight)
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = 1e4
    policy.lm_head = head
    args = PPOConfig(str(tmp_path), **SMALL | {"missing_eos_penalty": 7.0, "lam": 1.0})
    trainer = PPOTrainer(policy, count_77, args, rows(), processing_class=tokenizer)
    replies = trainer.rollout()
    experience = trainer._experience(replies, trainer.score(replies))
    assert all(e.returns == pytest.approx([0.0], abs=1e-5) for e in experience)


def test_text_prompts_a_function_and_no_value_model(tmp_path):
    """#2363, #2451, #3093: text prompts, Python rewards and value_model=None raised."""
    tiny.save_folder(tmp_path, "llama")
    dataset = [
        {"prompt": "My lamp is", "wanted": 77},
        {"prompt": [{"role": "user", "content": "Hi"}], "wanted": 78},
    ]

    def contains(completion_ids, wanted):
        return [float(token in ids) for ids, token in zip(completion_ids, wanted, strict=True)]

    trainer = PPOTrainer(str(tmp_path / "llama"), contains, PPOConfig(str(tmp_path / "o"), **SMALL), dataset)
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_reward_model_with_a_tokenizer_of_its_own(tmp_path):
    """#1674, #1979, #3595: it had to share the policy's."""
    other = new_reward_model(tiny.save_folder(tmp_path, "no_template"))
    tiny.save_folder(tmp_path, "llama")
    policy, tokenizer = load_policy(tmp_path / "llama")
    trainer = PPOTrainer(
        policy,
        other[0],
        PPOConfig(str(tmp_path / "o"), **SMALL),
        rows(),
        processing_class=tokenizer,
        reward_processing_classes=other[1],
    )
    trainer.train()
    assert not trainer.rewards.functions[0].reads_ids and trainer.state.global_step == 12


def test_rewards_token_by_token(tmp_path):
    """#1395. With gamma = lambda = 1 and no KL the return of a token is what comes after it."""

    def each(completion_ids):
        return [[float(i) for i in range(len(ids))] for ids in completion_ids]

    trainer = setting(tmp_path, each, kl_coef=0.0, lam=1.0, missing_eos_penalty=None)
    replies = trainer.rollout()
    for e in trainer._experience(replies, trainer.score(replies)):
        n = len(e.completions[0])
        assert e.returns == pytest.approx([float(sum(range(i, n))) for i in range(n)], abs=1e-4)


def test_with_adapters_there_is_one_backbone(tmp_path):
    """#2719, #2784: four full models were in memory."""
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = setting(tmp_path, count_77, given={"peft_config": config})
    whole = sum(p.numel() for p in load_policy(tmp_path / "llama")[0].parameters())
    extra = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora" in n or "value" in n)
    assert sum(p.numel() for p in trainer.model.parameters()) == whole + extra
    assert trainer.actor.reference.model is None and not hasattr(trainer.model, "value_model")


def test_padding_and_the_pad_id_change_nothing(tmp_path):
    """pad = eos removed the stop token from the loss."""
    trainer = setting(tmp_path)
    examples = [
        Example([5, 6, 7], ([8, 9, trainer.processing_class.eos_token_id],)),
        Example([10] * 9, ([11],)),
    ]
    found = []
    for pad in (trainer.processing_class.pad_token_id, trainer.processing_class.eos_token_id, 9):
        trainer.model.config.pad_token_id = pad
        with torch.no_grad():
            found.append(forward(trainer.model, batch_of(trainer.model, examples))[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0][0, 2] < 0  # the stop token has a log-probability


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """By exact expectation over a categorical policy. k2 and k3 there have another: they are refused."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    reference = (logits + 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    logits.requires_grad_(True)
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)

    def cosine(penalty):
        """REINFORCE with minus the penalty as the reward of each token, stop-gradient, weighted exactly."""
        surrogate = (logp.exp().detach() * penalty.detach() * logp).sum()
        (gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        return float(torch.cosine_similarity(gradient, true, dim=0))

    log_ratio = (logp - reference).detach()
    ours = -token_rewards(torch.zeros(50), log_ratio[:, None], torch.ones(50, 1, dtype=torch.bool), 1.0)[:, 0]
    assert cosine(ours) > 0.9999
    assert abs(cosine(torch.exp(-log_ratio) - 1 + log_ratio)) < 0.5 and abs(cosine(0.5 * log_ratio**2)) < 0.5
