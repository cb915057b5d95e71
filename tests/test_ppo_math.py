"""The mathematics of PPO against plain loops in float64 and hand-worked numbers."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.ppo_math import (
    adapted_kl_coef,
    gae,
    importance_weights,
    missing_eos,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def loop(rewards, values, mask, gamma, lam):
    """Oracle: the sum of discounted deltas of one reply, over the tokens that count."""
    kept = [t for t in range(len(mask)) if mask[t]]
    advantages = [0.0] * len(mask)
    for i, t in enumerate(kept):
        for k in range(i, len(kept)):
            following = values[kept[k + 1]] if k + 1 < len(kept) else 0.0
            delta = rewards[kept[k]] + gamma * following - values[kept[k]]
            advantages[t] += (gamma * lam) ** (k - i) * delta
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.9])
@pytest.mark.parametrize("kind", ["ragged", "gaps"])
def test_gae_is_the_sum_of_deltas(gamma, lam, kind):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 12, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([12, 1, 5, 12, 7, 0])
    mask = torch.arange(12) < lengths[:, None]
    if kind == "gaps":
        mask &= torch.rand(6, 12, generator=generator) < 0.6
    ours = gae(rewards, values, mask, gamma, lam)
    theirs = [loop(*row, gamma, lam) for row in zip(rewards.tolist(), values.tolist(), mask, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-12, rtol=0)
    single = gae(rewards.float(), values.float(), mask, gamma, lam)
    torch.testing.assert_close(single.double(), ours, atol=1e-5, rtol=1e-5)


def test_gae_of_one_token_by_hand():
    one = gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), 0.9, 0.9)
    assert one.tolist() == [[1.5]]


def test_gae_with_lambda_1_is_return_minus_value():
    rewards, values = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert gae(rewards, values, mask, 1.0, 1.0).tolist() == [[2.0, 1.0, 2.5]]


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 10_000))
def test_whiten_is_that_of_numpy_over_what_counts(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[0, 0] = True
    kept = values[mask].numpy()
    expected = (kept - kept.mean()) / numpy.sqrt(kept.var() + 1e-8)
    ours = whiten(values, mask)
    assert ours[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert not ours[~mask].any()


def test_the_score_is_at_the_last_token_and_the_k1_kl_at_every_one():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.1)
    expected = [[-0.05, 0.1, 9.8], [19.7, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_score_is_at_the_last_token_behind_a_gap():
    mask = torch.tensor([[True, False, True, False]])
    found = token_rewards(torch.tensor([1.0]), torch.zeros(1, 4), mask, 0.1)
    assert found.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_missing_eos():
    scores, stopped = [2.0, 2.0, -5.0], [True, False, False]
    assert missing_eos(scores, stopped, 1.0, "subtract") == [2.0, 1.0, -6.0]
    assert missing_eos(scores, stopped, 1.0, "replace") == [2.0, -1.0, -1.0]
    assert missing_eos(scores, stopped, None, "subtract") == scores
    assert missing_eos(scores, stopped, None, "replace") == scores
    assert missing_eos(scores, stopped, 0.0, "replace") == [2.0, 0.0, 0.0]
    assert missing_eos([], [], 1.0, "subtract") == []


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: the surrogate itself
        (1.5, 2.0, -2.4, 0.0),  # good and already more likely: no more of it
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: pulled up
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: no more of it
        (1.5, -2.0, 3.0, 3.0),  # bad and more likely: pushed down, unclipped
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    logps = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    found, ratios = policy_loss(logps, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-5) and ratios.item() == pytest.approx(ratio, rel=1e-5)
    assert logps.grad.item() == pytest.approx(slope, rel=1e-5)


def test_a_huge_ratio_stays_finite():
    logps = torch.tensor([[200.0]], requires_grad=True)
    loss, ratio = policy_loss(logps, torch.tensor([[-200.0]]), torch.tensor([[-1.0]]), 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and ratio.item() == pytest.approx(math.exp(20), rel=1e-4)


@pytest.mark.parametrize(
    ("value", "cliprange", "loss"),
    [
        (1.1, 0.2, 0.5 * 0.9**2),  # old 1, return 2: inside
        (1.5, 0.2, 0.5 * 0.8**2),  # moved too far towards the return: counted as at 1.2
        (0.5, 0.2, 0.5 * 1.5**2),  # moved away: in full
        (1.5, None, 0.5 * 0.5**2),
    ],
)
def test_value_loss_by_hand(value, cliprange, loss):
    found = value_loss(torch.tensor([[value]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]), cliprange)
    assert found.item() == pytest.approx(loss, rel=1e-5)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """REINFORCE with -k1 as the reward, by Monte Carlo, against the exact gradient of a categorical."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, generator=generator, requires_grad=True)
    reference = torch.randn(8, generator=generator).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)[0]
    drawn = torch.multinomial(logp.exp().detach(), 200_000, replacement=True, generator=generator)
    k1 = (logp - reference).detach()[drawn]
    estimate = torch.autograd.grad((k1 * logp[drawn]).mean(), logits)[0]
    assert torch.cosine_similarity(exact, estimate, dim=0) > 0.99


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    old, advantages = torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]])
    logps = torch.tensor([[math.log(10.0), math.log(10.0)]])
    assert policy_loss(logps, old, advantages, 0.2)[0].tolist()[0] == pytest.approx([10.0, -1.2])
    assert policy_loss(logps, old, advantages, 0.2, dual_clip=3.0)[0].tolist()[0] == pytest.approx(
        [3.0, -1.2]
    )


def test_the_ratio_may_rise_further_than_it_falls():
    old, advantages = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    logps = torch.tensor([[math.log(1.5), math.log(0.5)]])
    loss = policy_loss(logps, old, advantages, 0.2, cliprange_high=0.28)[0]
    assert loss.tolist()[0] == pytest.approx([-1.28, 0.8])


def test_importance_weights_by_hand():
    trained, sampled = torch.log(torch.tensor([[1.0, 3.0, 0.4]])), torch.zeros(1, 3)
    assert importance_weights(trained, sampled, None, 2.0).tolist() == [[1, 1, 1]]
    assert importance_weights(trained, sampled, "tis", 2.0).tolist()[0] == pytest.approx([1, 2, 0.4])
    assert importance_weights(trained, sampled, "mask", 2.0).tolist()[0] == pytest.approx([1, 0, 0])


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (12.0, 0.1 * (1 + 0.2 * 0.01)), (5.4, 0.1 * (1 - 0.1 * 0.01))]
)
def test_the_price_of_kl_is_steered_as_by_ziegler(kl, expected):
    assert adapted_kl_coef(0.1, kl, 6.0, 100, 10_000) == pytest.approx(expected)


def test_kl_clip_and_rewards_whitened_around_their_mean():
    kl, mask = torch.tensor([[50.0, -50.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert token_rewards(torch.tensor([1.0]), kl, mask, 0.1, kl_clip=10.0).tolist() == [[-1.0, 2.0]]
    values = torch.tensor([[1.0, 3.0, 8.0]])
    kept = whiten(values, torch.ones(1, 3, dtype=torch.bool), keep_mean=True)
    assert kept.mean().item() == pytest.approx(4.0) and kept.std(correction=0).item() == pytest.approx(
        1, abs=1e-5
    )
