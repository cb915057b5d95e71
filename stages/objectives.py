"""Objectives of policies: pure functions of log-probabilities, values and masks, and their batches.

Shapes: B pairs or rows, C completion tokens; all log-probabilities are natural logs of whole completions or
of single tokens, as named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward.batch import Example
from reward.tokens import batch_of, forward


@dataclass(frozen=True)
class Pair(Example):
    """A prompt with (chosen, rejected), and the reference's log-probability of each."""

    reference: tuple[float, float]


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(beta * (difference of log-ratios)); Rafailov et al. 2023, equation 7.

    `policy` and `reference` are (B, 2) log-probabilities of chosen and rejected. Returns the (B,) loss and
    the (B, 2) implicit rewards beta * log(pi / pi_ref), without gradient.
    """
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach()


class DPO:
    """Direct preference optimisation over `Pair`s, each weighing the same."""

    def __init__(self, beta: float):
        self.beta = beta

    def weight(self, examples: Sequence[Pair]) -> float:
        return len(examples)

    def loss(self, model: nn.Module, examples: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        logps, _ = forward(model, batch_of(model, examples))
        policy = logps.sum(1).view(-1, 2)
        reference = torch.tensor([pair.reference for pair in examples], device=policy.device)
        loss, rewards = dpo_loss(policy, reference, self.beta)
        change = (policy - reference).detach()
        return loss.sum(), {
            "accuracy": (rewards[:, 0] > rewards[:, 1]).float().sum(),
            "margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            "logps_chosen_change": change[:, 0].sum(),
            "logps_rejected_change": change[:, 1].sum(),
        }


class NLL:
    """Negative log-likelihood of every completion token: language modelling, or demonstrations."""

    def weight(self, examples: Sequence[Example]) -> float:
        return sum(len(completion) for example in examples for completion in example.completions)

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        logps, _ = forward(model, batch_of(model, examples))
        return -logps.sum(), {}
