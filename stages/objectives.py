"""Objectives of policies: pure functions of log-probabilities, and what the engine makes of them.

Shapes: B examples, K completions each, best first (a pair has K = 2: chosen, rejected); log-probabilities are
natural logs of whole completions. Each direct loss returns its value (B,) and the rewards (B, K) that it
ranks by. Where they come from and when to choose which: stages/objectives.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reward.batch import Example
from reward.together import of_parts, parts
from reward.tokens import batch_of, forward

Loss = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pair(Example):
    """A prompt with its completions, best first, their log-probabilities by the reference, the verdicts."""

    reference: tuple[float, ...] = ()
    """Empty for objectives that have none."""
    votes: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Share of the verdicts that prefer the first, see a tie, prefer the second."""
    strength: float = 1.0
    """How much better the first is on average, up to 3; 0 for a tie."""
    task: str = ""


@dataclass(frozen=True)
class Demonstration(Example):
    """A prompt with the completion to learn, or plain text."""

    task: str = ""
    """What to call it by."""


class Judged(NamedTuple):
    """One batch of pairs or rankings, as the losses read it."""

    policy: Tensor
    """(B, K) log-probabilities."""
    reference: Tensor
    """(B, K) log-probabilities, the same shape; zeros where there is no reference."""
    lengths: Tensor
    """(B, K) tokens, the stop token included; 0 where a shorter ranking is padded."""
    votes: Tensor
    """(B, 3) shares of the verdicts: first, tie, second."""
    strength: Tensor
    """(B,) mean judged strength, 0..3."""

    @classmethod
    def of(cls, examples: Sequence[Pair], policy: Tensor | None = None) -> "Judged":
        """`policy`: (R,) log-probabilities of all completions in order; None: those of the reference."""
        sizes = [len(pair.completions) for pair in examples]
        device = "cpu" if policy is None else policy.device

        def table(rows: Sequence[Sequence[float]]) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)

        reference = table([pair.reference or [0.0] * len(pair.completions) for pair in examples])
        return cls(
            reference if policy is None else pad_sequence(list(torch.split(policy, sizes)), batch_first=True),
            reference,
            table([[len(completion) for completion in pair.completions] for pair in examples]),
            table([pair.votes for pair in examples]),
            torch.tensor([pair.strength for pair in examples]).to(device),
        )

    @property
    def ratio(self) -> Tensor:
        """(B, K) log pi / pi_ref: how far each completion has moved."""
        return self.policy - self.reference


def sigmoid(x: Judged, *, beta: float, label_smoothing: float, margin: float) -> Loss:
    """-log sigmoid(beta * (difference of log-ratios)): DPO, Rafailov et al. 2023, equation 7.

    With label smoothing e the pair counts as flipped with probability e (cDPO, Mitchell 2023); a margin asks
    for a difference of at least margin * strength (DPO with an offset, Amini et al. 2024).
    """
    rewards = beta * x.ratio
    difference, offset = rewards[:, 0] - rewards[:, 1], margin * x.strength
    as_judged, flipped = F.logsigmoid(difference - offset), F.logsigmoid(-difference - offset)
    return -(1 - label_smoothing) * as_judged - label_smoothing * flipped, rewards.detach()


def sigmoid_norm(x: Judged, *, beta: float) -> Loss:
    """-log sigmoid(beta * (difference of log-ratios per token)): Lambert et al. 2024 (Tulu 3)."""
    rewards = beta * x.ratio / x.lengths
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach()


def robust(x: Judged, *, beta: float, label_smoothing: float) -> Loss:
    """The DPO loss of clean labels, estimated without bias from labels of which a share e is flipped.

    ((1 - e) L(pair) - e L(flipped pair)) / (1 - 2e): Chowdhury et al. 2024 (arXiv 2403.00409), rDPO.
    """
    rewards = beta * x.ratio
    difference = rewards[:, 0] - rewards[:, 1]
    flipped = label_smoothing * F.logsigmoid(-difference)
    loss = flipped - (1 - label_smoothing) * F.logsigmoid(difference)
    return loss / (1 - 2 * label_smoothing), rewards.detach()


def hinge(x: Judged, *, beta: float) -> Loss:
    """max(0, 1 - beta * (difference of log-ratios)): SLiC (Zhao et al. 2023) with a reference, as in RSO
    (Liu et al. 2023, arXiv 2309.06657, hinge-norm)."""
    rewards = beta * x.ratio
    return F.relu(1 - (rewards[:, 0] - rewards[:, 1])), rewards.detach()


def ipo(x: Judged, *, beta: float) -> Loss:
    """(difference of log-ratios per token - 1 / (2 beta))^2: Azar et al. 2023, equation 17 with tau = beta.

    The paper writes sums over the reply; its authors use means per token, and so does TRL.
    """
    ratio = x.ratio / x.lengths
    return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)) ** 2, ratio.detach()


def ties(x: Judged, *, beta: float, tie: float) -> Loss:
    """Negative log-likelihood of the verdicts, ties among them: Davidson 1970, over rewards.

    P(first), P(tie), P(second) are proportional to exp(d / 2), tie, exp(-d / 2) with d the difference of
    beta * log-ratios: Chen et al. 2024 (arXiv 2409.17431), DPO-D. Of two equals a share tie / (2 + tie) tie.
    """
    rewards = beta * x.ratio
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    logp = torch.stack([half, torch.full_like(half, tie).log(), -half], dim=1).log_softmax(1)
    return -(x.votes * logp).sum(1), rewards.detach()


def simpo(x: Judged, *, beta: float, gamma: float) -> Loss:
    """-log sigmoid(beta * (difference of mean log-probabilities) - gamma): Meng et al. 2024, equation 6."""
    rewards = beta * x.policy / x.lengths
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - gamma), rewards.detach()


def orpo(x: Judged, *, beta: float) -> Loss:
    """NLL of the chosen - beta * log sigmoid(log odds ratio): Hong et al. 2024, equations 6 and 7.

    odds = p / (1 - p) with log p the mean log-probability of a completion's tokens.
    """
    mean = (x.policy / x.lengths).clamp(max=-1e-6)  # odds are infinite at p = 1
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -mean[:, 0] - beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), log_odds.detach()


def plackett_luce(x: Judged, *, beta: float) -> Loss:
    """Negative log-likelihood of a ranking, drawn best first from softmax(rewards) without putting back.

    - sum over i of (r_i - log sum over j >= i of exp r_j): Rafailov et al. 2023, A.3.
    """
    rewards = (beta * x.ratio).masked_fill(x.lengths == 0, torch.finfo(x.policy.dtype).min)  # never drawn
    rest = rewards.flip(1).logcumsumexp(1).flip(1)
    return (rest - rewards).sum(1), rewards.detach()


LOSSES: dict[str, Callable[..., Loss]] = {
    loss.__name__: loss
    for loss in (sigmoid, sigmoid_norm, robust, hinge, ipo, ties, simpo, orpo, plackett_luce)
}


@dataclass(frozen=True)
class Direct:
    """Direct preference optimisation over `Pair`s, each weighing the same, by one of LOSSES.

    Those that share completions may be together in one example (`reward.together`).

    `sft_weight` times the mean negative log-likelihood of the best completion's tokens is added.
    """

    name: str
    parameters: dict[str, float]
    sft_weight: float = 0.0

    def weight(self, examples: Sequence[Example]) -> float:
        return len(parts(examples))

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        logps, _ = forward(model, batch_of(model, examples))
        pairs: list[Pair] = parts(examples)
        x = Judged.of(pairs, of_parts(examples, logps.sum(1)))
        loss, rewards = self.of(x)
        if self.sft_weight:
            best = x.policy[:, 0] / x.lengths[:, 0]
            loss = loss - self.sft_weight * torch.where(x.strength > 0, best, 0.0)  # a tie has no best
        right = (rewards[:, 0] > rewards[:, 1:].amax(1)).float()
        moved, name = x.ratio.detach(), "_change" if pairs[0].reference else ""
        return loss.sum(), {
            "accuracy": torch.where(x.strength == 0, 0.5, right).sum(),
            "margin": (rewards[:, 0] - rewards[:, 1]).sum(),
            f"logps_chosen{name}": moved[:, 0].sum(),
            f"logps_rejected{name}": moved[:, 1].sum(),
        }

    def of(self, x: Judged) -> Loss:
        return LOSSES[self.name](x, **self.parameters)

    def start(self, examples: Sequence[Example]) -> float:
        """Mean loss, but for the SFT term, of a policy that is the reference: ln 2 for `sigmoid`."""
        return float(self.of(Judged.of(parts(examples)))[0].mean())


class NLL:
    """Negative log-likelihood of every completion token: language modelling, or demonstrations."""

    def weight(self, examples: Sequence[Example]) -> float:
        return sum(len(completion) for example in examples for completion in example.completions)

    def loss(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        logps, _ = forward(model, batch_of(model, examples))
        return -logps.sum(), {}
