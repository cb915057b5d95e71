"""Rewards in units of their own spread, which changes while a policy learns."""

import math
from collections.abc import Mapping, Sequence

EPSILON = 1e-8
"""Added to the variance, so that rewards that are all alike become 0."""


class RunningScale:
    """Mean and standard deviation of all rewards so far, without keeping them.

    Batches are joined by the pairwise formula of Chan, Golub and LeVeque (1979, "Updating formulae and a
    pairwise algorithm for computing sample variances"), which loses no digits to a large mean.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares of the deviations from the mean, summed

    @property
    def std(self) -> float:
        """Of all values so far (biased); 1 before there are any."""
        return math.sqrt(self.squares / self.count + EPSILON) if self.count else 1.0

    def update(self, values: Sequence[float]) -> None:
        """Take a batch of rewards into account."""
        if not values:
            return
        count, mean = len(values), math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        total, apart = self.count + count, mean - self.mean
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    def __call__(self, values: Sequence[float]) -> list[float]:
        """(value - mean) / std."""
        return [(value - self.mean) / self.std for value in values]

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
