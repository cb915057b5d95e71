"""What a reward model minimises: Bradley-Terry, with ties and strength where annotators gave them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from annotate.records import Judgement
from reward.batch import Example
from reward.together import of_parts, parts
from reward.tokens import device_of, scores


@dataclass(frozen=True)
class Comparison(Example):
    """A prompt with two completions and how often each preference from -3 to 3 was given (7 counts)."""

    counts: tuple[int, ...]
    task: str = ""


def preference_logprobs(difference: Tensor, thresholds: Tensor) -> Tensor:
    """Log-probabilities of the preferences -3..3 given the reward difference d = r(first) - r(second).

        P(y | d)  proportional to  exp(thresholds[|y|] + y d / 2)

    This is the adjacent-categories model of Agresti (1992, "Analysis of ordinal paired comparison data",
    Applied Statistics 41, equation 3) with symmetric thresholds. It contains the simpler models: with only
    y = -1 and 1 it is Bradley-Terry, P = sigmoid(d); with a tie added it is Davidson (1970).

    Shapes: difference (B,), thresholds (4,) with -inf for a strength that never occurs; returns (B, 7).
    """
    preference = torch.arange(-3, 4, device=difference.device)
    return torch.log_softmax(thresholds[preference.abs()] + difference[:, None] * preference / 2, dim=1)


def preference_loss(difference: Tensor, counts: Tensor, thresholds: Tensor) -> Tensor:
    """Negative log-likelihood of the judgements of each pair: (B,) from (B,), (B, 7) and (4,)."""
    logp = preference_logprobs(difference, thresholds)
    return -(counts * logp.masked_fill(counts == 0, 0.0)).sum(1)


def count_preferences(judgements: Sequence[Judgement]) -> tuple[int, ...]:
    """How often each of -3..3 was given; judgements without a verdict do not count."""
    given = [j.preference for j in judgements if j.preference is not None]
    return tuple(given.count(preference) for preference in range(-3, 4))


def initial_thresholds(comparisons: Sequence[Comparison]) -> Tensor:
    """Where training starts: the log-frequency of each strength, per side; -inf for one that never occurs."""
    totals = torch.tensor([comparison.counts for comparison in comparisons], dtype=torch.float32).sum(0)
    by_strength = torch.stack(
        [totals[3], totals[2] + totals[4], totals[1] + totals[5], totals[0] + totals[6]]
    )
    sides = torch.tensor([1.0, 2.0, 2.0, 2.0])
    return (by_strength / sides / totals.sum()).log()


class PreferenceLikelihood:
    """Negative log-likelihood of the judgements; the thresholds train along, as a parameter of the model.

    Its examples are comparisons, those that share completions together (`reward.together`) or each alone.
    """

    def __init__(self, model: nn.Module, comparisons: Sequence[Comparison]):
        thresholds = initial_thresholds(comparisons)
        self.unused = thresholds.isinf()
        model.thresholds = nn.Parameter(thresholds.masked_fill(self.unused, 0.0).to(device_of(model)))

    def weight(self, examples: Sequence[Example]) -> float:
        return sum(sum(comparison.counts) for comparison in parts(examples))

    def loss(self, model: Any, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        score = of_parts(examples, scores(model, examples)).view(-1, 2)
        difference = score[:, 0] - score[:, 1]
        given = [comparison.counts for comparison in parts(examples)]
        counts = torch.tensor(given, dtype=torch.float32, device=score.device)
        loss = preference_loss(difference, counts, self._thresholds(model))
        right = torch.where(difference > 0, counts[:, 4:].sum(1), counts[:, :3].sum(1))
        decided = counts.sum() - counts[:, 3].sum()
        return loss.sum(), {"accuracy": (right.sum() / decided.clamp(min=1) * counts.sum()).detach()}

    def _thresholds(self, model: Any) -> Tensor:
        thresholds: Tensor = model.thresholds.masked_fill(self.unused.to(model.thresholds.device), -torch.inf)
        return thresholds

    def detach(self, model: Any) -> list[float | None]:
        """Take the thresholds off the model, which is ordinary then; None for a strength never given."""
        values = [
            None if unused else t for unused, t in zip(self.unused, model.thresholds.tolist(), strict=True)
        ]
        del model.thresholds
        return values
