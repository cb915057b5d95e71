"""PPO against golden tensors of TRL 1.12, taken from inside its own `train` (goldens/make_ppo.py)."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from reward.sampler import Sample
from stages.ppo_math import gae, policy_loss, token_rewards, value_loss, whiten
from stages.ppo_trainer import PPOConfig, PPOTrainer
from tests.benchmarks.ppo_worker import (
    EOS,
    KL_COEF,
    LEARNING_RATE,
    PAD,
    TEMPERATURE,
    Size,
    classifier_of,
    policy_of,
    tokenizer_of,
)
from tests.goldens.make_ppo import FILE, OTHERS, SGD_RATE, SIZE, reference_of

GOLDEN = load_file(FILE)
CLIP = 0.2  # TRL's default, of policy and value


def group(name: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{name}/"): value for key, value in GOLDEN.items() if key.startswith(f"{name}/")
    }


ROLLOUT = group("rollout")
TOKENS, STATES = (
    ~ROLLOUT["padding_mask"],
    ~ROLLOUT["padding_mask_p1"],
)  # TRL also has a value after the stop token


def close(ours, golden, atol=1e-6):
    torch.testing.assert_close(ours, golden, atol=atol, rtol=1e-6)


def unbiased(values, mask):
    """What turns our variance of a whitening into TRL's, which is divided by n - 1."""
    kept = values[mask]
    return torch.sqrt((kept.var(correction=0) + 1e-8) / (kept.var() + 1e-8))


def test_whitening_but_for_the_unbiased_variance():
    of = group("functions")
    values, mask = of["values"], of["mask"]
    close(whiten(values, mask)[mask] * unbiased(values, mask), of["whiten"][mask])
    close(values[mask].mean(), of["mean"])
    close(values[mask].var(), of["var"])
    advantages, golden = ROLLOUT["advantages"], ROLLOUT["whitened"]
    close(whiten(advantages, TOKENS)[TOKENS] * unbiased(advantages, TOKENS), golden[TOKENS])


def test_rewards_of_tokens():
    """TRL gives the score to the state after the stop token, if the answer has room for one."""
    kl = (ROLLOUT["logprobs"] - ROLLOUT["ref_logprobs"]) * TOKENS
    assert kl.abs().max() > 0.1 and (STATES.sum(1) > TOKENS.sum(1)).any() and TOKENS.all(1).any()
    close(token_rewards(ROLLOUT["scores"], kl, STATES, KL_COEF), ROLLOUT["rewards"])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), *OTHERS])
def test_advantages_of_ragged_answers(gamma, lam):
    golden = ROLLOUT["advantages"] if gamma == 1 else GOLDEN[f"gae/{gamma}/{lam}"]
    assert len(set(TOKENS.sum(1).tolist())) > 3
    close(gae(ROLLOUT["rewards"], ROLLOUT["values"], STATES, gamma, lam), golden)


@pytest.mark.parametrize("step", range(16))
def test_losses_of_every_minibatch(step):
    of = {name: values[step] for name, values in group("minibatches").items()}
    rows = of["mini_batch_inds"]
    tokens, states = TOKENS[rows], STATES[rows]
    advantages = torch.zeros(tokens.shape).masked_scatter(tokens, ROLLOUT["whitened"][rows][tokens])
    loss, ratio = policy_loss(of["new_logprobs"], ROLLOUT["logprobs"][rows], advantages, CLIP)
    close(loss[tokens].mean(), of["pg_loss"])
    counts = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP) > -advantages * ratio
    close(counts[tokens].float().mean(), of["pg_clipfrac"])
    old, returns = ROLLOUT["values"][rows], ROLLOUT["returns"][rows]
    found = value_loss(of["vpred"], old, returns, CLIP)
    close(found[states].mean(), of["vf_loss"])
    counts = found > value_loss(of["vpred"], old, returns, None) + 1e-6  # ours rounds where it does not clip
    close(counts[states].float().mean(), of["vf_clipfrac"])


# A whole update: 16 optimiser steps


class Replayed:
    """A sampler that gives TRL's answers."""

    def sample(self, prompts, keys):
        answers = [row[kept] for row, kept in zip(ROLLOUT["responses"], TOKENS, strict=True)]
        logps = [row[kept].tolist() for row, kept in zip(ROLLOUT["logprobs"], TOKENS, strict=True)]
        pairs = zip(answers, logps, strict=True)
        return [Sample(ids.tolist(), logp, int(ids[-1]) == EOS, []) for ids, logp in pairs]

    def text(self, sample):
        return ""


class AsTRL(PPOTrainer):
    """Takes the minibatches in TRL's order, and divides the variance of advantages by n - 1 as it does."""

    def _permutation(self, n, a, b):
        if b < 0:  # of the prompts
            return list(range(n))
        return group("minibatches")["mini_batch_inds"].reshape(-1, n)[b].tolist()

    def _experience(self, replies, scores):
        found = super()._experience(replies, scores)
        scale = unbiased(ROLLOUT["advantages"], TOKENS).item()
        return [replace(e, advantages=[scale * a for a in e.advantages]) for e in found]


def updated(folder, rate, **settings):
    """Models of ours after the update, started from TRL's weights with its prompts, answers and scores."""
    size = Size(**SIZE)
    policy, value = policy_of(size), classifier_of(size, 2)
    for part, model in (("policy", policy), ("value", value)):
        model.load_state_dict(group(f"before/{part}"))
    reference = reference_of(size)
    prompts = [row[: -size.answer] for row in ROLLOUT["query_responses"]]
    texts = [" ".join(f"w{token}" for token in row[row != PAD].tolist()) for row in prompts]
    assert len({len(text.split()) for text in texts}) > 2  # so TRL's were padded, on the left
    args = PPOConfig(
        str(folder),
        per_device_train_batch_size=size.minibatch,
        num_mini_batches=size.minibatches,
        total_episodes=size.batch,
        response_length=size.answer,
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        missing_eos_penalty=None,
        score_slot="post_eos",
        max_grad_norm=0.0,
        learning_rate=rate,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        **settings,
    )
    trainer = AsTRL(
        policy,
        lambda completions, **_: ROLLOUT["scores"].tolist(),
        args,
        [{"prompt": text} for text in texts],
        processing_class=tokenizer_of(size),
        ref_model=reference,
        value_model=value,
    )
    trainer.actor.sampler = Replayed()
    trainer.max_tokens = 40  # some micro-batches a step, sorted by length
    replies = trainer.rollout()
    metrics = trainer.update(replies, trainer.score(replies))
    return {"policy": policy, "value": value}, metrics


def change(models, part):
    """Of every weight, in one vector: (ours, TRL's), without the keys' biases.

    Attention does not depend on them, so their gradient is rounding, which AdamW would make as large as any.
    """
    before, optimiser = group(f"before/{part}"), models["optimiser"]
    golden = {
        name: value for name, value in group(f"{optimiser}/{part}").items() if "k_proj.bias" not in name
    }
    now = dict(models[part].named_parameters())
    ours = {name: now[name].detach() - before[name] for name in golden}
    return tuple(torch.cat([of[name].flatten() for name in golden]) for of in (ours, golden))


def test_an_update_with_sgd_changes_the_weights_as_trl_does(tmp_path):
    models, metrics = updated(tmp_path, SGD_RATE, optim="sgd")
    assert metrics["clip_fraction"] >= 0.3
    for part in ("policy", "value"):
        ours, golden = change(models | {"optimiser": "sgd"}, part)
        assert golden.norm() > 0.1 and (ours - golden).norm() / golden.norm() <= 1e-4


def test_an_update_with_adamw_changes_the_weights_as_trl_does(tmp_path):
    models, _ = updated(tmp_path, LEARNING_RATE, adam_epsilon=1e-8)
    for part in ("policy", "value"):
        ours, golden = change(models | {"optimiser": "adamw"}, part)
        assert golden.abs().max() > 1e-5 and (ours - golden).abs().max() <= 2e-6
