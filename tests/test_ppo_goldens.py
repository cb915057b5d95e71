"""PPO against golden tensors of TRL 1.12, taken from inside its own `train` (goldens/make_ppo.py)."""

import pytest
import torch
from safetensors.torch import load_file

from stages.ppo_math import gae, policy_loss, token_rewards, value_loss, whiten
from tests.goldens.make_ppo import FILE, KL_COEF, OTHERS

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
