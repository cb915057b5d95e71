"""The mathematics of PPO: tensors in, tensors out, each with the equation it implements.

Shapes: R replies, C completion tokens; `mask` is True at tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before exp, which would overflow."""


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, kl_clip: float | None = None
) -> Tensor:
    """(R, C): minus kl_coef times the k1 KL at every token, plus the score (R,) at each reply's last token.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2. k1 = log pi - log pi_ref is the estimator whose
    gradient through the reward is that of the KL; k2 and k3 in the reward all but switch the constraint off.
    A reply without any token gets its score nowhere. `kl_clip` bounds the KL of every token.
    """
    if kl_clip is not None:
        kl = kl.clamp(-kl_clip, kl_clip)
    result = -kl_coef * kl * mask
    for row, tokens in enumerate(mask):
        if tokens.any():
            result[row, tokens.nonzero()[-1, 0]] += scores[row]
    return result


def missing_eos(
    scores: Sequence[float],
    stopped: Sequence[bool],
    penalty: float | None,
    mode: Literal["subtract", "replace"],
) -> list[float]:
    """Scores with the rule for replies that did not stop by themselves.

    `subtract` takes the penalty off the score (TRL); `replace` puts minus the penalty in its place (Ziegler
    et al. 2019, section 3.1.2, where the fixed score was -1).
    """
    if penalty is None:
        return list(scores)
    kept = 1.0 if mode == "subtract" else 0.0
    return [score if ended else kept * score - penalty for score, ended in zip(scores, stopped, strict=True)]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates; Schulman et al. 2016 (arXiv 1506.02438), equation 16. All (R, C).

    Masked positions are skipped, wherever they are: the value and advantage after them are carried across.
    """
    advantages = torch.zeros_like(rewards)
    following_value = torch.zeros(len(rewards), dtype=rewards.dtype)
    following_advantage = torch.zeros_like(following_value)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = delta + gamma * lam * following_advantage
        following_advantage = torch.where(here, advantage, following_advantage)
        following_value = torch.where(here, values[:, t], following_value)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages


def whiten(values: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """Shift and scale the unmasked entries to mean 0 and variance 1 (biased, eps 1e-8); zero elsewhere.

    `keep_mean`: scale only, as for rewards, whose mean says something.
    """
    kept = values[mask]
    mean = kept.mean()
    scaled = (values - mean) / torch.sqrt(kept.var(correction=0) + 1e-8)
    return (scaled + mean if keep_mean else scaled) * mask


def policy_loss(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, negated; Schulman et al. 2017 (arXiv 1707.06347), equation 7. (R, C) each.

    The ratio may fall to 1 - cliprange and rise to 1 + cliprange_high (Yu et al. 2025, arXiv 2503.14476,
    equation 10). `dual_clip` bounds the loss at -dual_clip * advantage where the advantage is negative (Ye
    et al. 2020, arXiv 1912.09729, equation 5). Returns the loss and the probability ratio of every token.
    """
    ratio = torch.exp((logps - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    high = cliprange if cliprange_high is None else cliprange_high
    clipped = ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.max(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)
    return loss, ratio


def importance_weights(
    trained: Tensor, sampled: Tensor, correction: Literal["tis", "mask"] | None, threshold: float
) -> Tensor:
    """Weights that correct for sampling by other numerics than training's; (R, C) log-probabilities each.

    `tis` truncates the ratio trained / sampled at the threshold (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"); `mask` keeps ratios between 1 / threshold and the
    threshold and drops all others.
    """
    if correction is None:
        return torch.ones_like(trained)
    ratio = torch.exp((trained - sampled).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if correction == "tis":
        return ratio.clamp(max=threshold)
    return ratio * ((ratio <= threshold) & (ratio >= 1 / threshold))


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The price of KL, steered so that `kl` (nats per reply) goes to its target.

    Ziegler et al. 2019, section 2.2: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon).
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, cliprange: float | None) -> Tensor:
    """Half the squared error, the worse of unclipped and clipped (Huang et al. 2024). (R, C) each."""
    error = (values - returns) ** 2
    if cliprange is not None:
        clipped = old + (values - old).clamp(-cliprange, cliprange)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error
