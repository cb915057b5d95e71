"""PPO's objective on the engine: the clipped policy and value losses over the tokens of an optimiser step."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reward.batch import Batch, Example
from reward.prefix import Prefix
from reward.tokens import batch_of, forward
from stages.ppo_config import PPOConfig
from stages.ppo_math import policy_loss, value_loss


@dataclass(frozen=True)
class Experience(Example):
    """A prompt with its sampled reply and, for each token of it, what the update needs."""

    old_logps: list[float]
    old_values: list[float]
    advantages: list[float]
    returns: list[float]
    weights: list[float]
    """Of the tokens in the policy loss."""
    appended: bool = False
    """Is the last token not of the reply, but the state after its stop? It trains the value alone."""
    states: Tensor | None = None
    """(T, d), entering the first trained layer, where the layers below are frozen."""


class PPO:
    """Policy loss per policy token and value loss per state, both over the whole optimiser step."""

    def __init__(self, config: PPOConfig, prefix: Prefix | None = None):
        self.config, self.prefix = config, prefix
        self.trains_policy = True
        self.tokens = self.slots = self.ratio = self.kl = 0.0  # of the present step

    def weight(self, examples: Sequence[Experience]) -> float:
        self.slots = float(sum(len(example.completions[0]) for example in examples))
        self.tokens = self.slots - sum(example.appended for example in examples)
        self.ratio = self.kl = 0.0
        return max(1.0, self.tokens)

    def loss(self, model: nn.Module, examples: Sequence[Experience]) -> tuple[Tensor, dict[str, Tensor]]:
        config, batch = self.config, batch_of(model, examples)
        with self._from_states(batch, examples):
            logps, values = forward(model, batch, config.temperature)
        assert values is not None
        old_logps, old_values, advantages, returns, weights = _columns(batch, examples)
        appended = torch.tensor([example.appended for example in examples], device=batch.mask.device)
        tokens = batch.mask & ~(appended[:, None] & (batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True)))
        of_policy, ratio = policy_loss(
            logps, old_logps, advantages, config.cliprange, config.cliprange_high, config.dual_clip
        )
        of_policy = (of_policy * weights * tokens).sum() * self.trains_policy
        of_value = value_loss(values, old_values, returns, config.cliprange_value)
        of_value = (of_value * batch.mask).sum() * (self.tokens / max(1.0, self.slots))
        with torch.no_grad():
            metrics = _metrics(logps[tokens], old_logps[tokens], ratio[tokens], config)
        metrics |= {"policy_loss": of_policy.detach(), "value_loss": of_value.detach()}
        self.ratio += float(metrics["ratio"]) / max(1.0, self.tokens)
        self.kl += float(metrics["approx_kl"]) / max(1.0, self.tokens)
        return of_policy + config.vf_coef * of_value, metrics

    def _from_states(self, batch: Batch, examples: Sequence[Experience]) -> Any:
        if self.prefix is None:
            return nullcontext()
        return self.prefix.given(batch.join([e.states for e in examples if e.states is not None]))


def _columns(batch: Batch, examples: Sequence[Experience]) -> tuple[Tensor, ...]:
    """(K, C) each of what the experience holds for every token."""
    names = ("old_logps", "old_values", "advantages", "returns", "weights")
    flat = ([x for example in examples for x in getattr(example, name)] for name in names)
    return tuple(batch.pad(torch.tensor(values, device=batch.mask.device)) for values in flat)


def _metrics(logps: Tensor, old: Tensor, ratio: Tensor, config: PPOConfig) -> dict[str, Tensor]:
    """Sums over the policy's tokens. `approx_kl` is k2, half the squared log-ratio (Schulman 2020)."""
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    clipped = (ratio > 1 + high) | (ratio < 1 - config.cliprange)
    return {
        "clip_fraction": clipped.float().sum(),
        "approx_kl": 0.5 * ((logps - old) ** 2).sum(),
        "ratio": ratio.sum(),
    }
