"""How far annotators agree: share of equal verdicts, Krippendorff's alpha, and which side they lean to.

Preferences are -3..3 with 0 for a tie. All intervals are clustered by task, since labels of one task share
its texts: they say how far the number could move with other tasks and the same people.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from annotate.statistics import Estimate, proportion

Ratings = Iterable[Sequence[int]]
"""For each task the preferences of those who gave one, in canonical order of the completions."""

POINTS = 7
"""Of the scale -3..3."""


def raw_agreement(tasks: Ratings) -> Estimate | None:
    """Share of pairs of labels on one task with the same verdict (first, second, tie). None without pairs."""
    same, names = [], []
    for name, ratings in enumerate(tasks):
        for one, other in combinations(ratings, 2):
            same.append(float(np.sign(one) == np.sign(other)))
            names.append(name)
    return proportion(same, names) if same else None


def krippendorff_alpha(tasks: Ratings, resamples: int = 1000, level: float = 0.95) -> Estimate | None:
    """Krippendorff's alpha for ordinal ratings, with a percentile interval from resampling tasks.

    alpha = 1 - observed / expected disagreement over the coincidence matrix o of values within tasks
    (Krippendorff, Content Analysis, 2018, chapter 12): 1 is perfect, 0 what chance gives.
    The ordinal distance of two values is the number of ratings between them, squared. None where no task has
    two ratings, or where all ratings are equal.
    """
    o = np.array([_coincidences(ratings) for ratings in tasks if len(ratings) > 1])
    if len(o) == 0:
        return None
    value = _alpha(o.sum(axis=0))
    if np.isnan(value):
        return None
    dice = np.random.default_rng(0)  # the same labels give the same interval
    flat = o.reshape(len(o), -1)
    draws = []
    for _ in range(resamples):
        weight = np.bincount(dice.integers(len(o), size=len(o)), minlength=len(o))
        draws.append(_alpha((weight @ flat).reshape(POINTS, POINTS)))
    spread = np.array(draws)[~np.isnan(draws)]
    if len(o) == 1 or len(spread) < 2:
        return Estimate(value, np.nan, np.nan, np.nan, round(float(o.sum())), len(o))
    low, high = np.quantile(spread, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value, float(low), float(high), float(spread.std(ddof=1)), round(float(o.sum())), len(o))


def first_shown_wins(labels: Iterable[tuple[str, int, Sequence[int]]]) -> Estimate | None:
    """Share of decided verdicts for the completion shown first, from (task, preference, display order).

    One half is unbiased, since the order is drawn. None where every verdict is a tie.
    """
    wins, names = [], []
    for task, preference, order in labels:
        if preference != 0:
            wins.append(float((preference > 0) == (order[0] == 0)))
            names.append(task)
    return proportion(wins, names) if wins else None


def _coincidences(ratings: Sequence[int]) -> NDArray[np.float64]:
    """[7, 7]: how often value c met value k within one task, each rating counting once in all."""
    count = np.bincount(np.asarray(ratings) + POINTS // 2, minlength=POINTS).astype(np.float64)
    return (np.outer(count, count) - np.diag(count)) / (len(ratings) - 1)


def _alpha(o: NDArray[np.float64]) -> float:
    """Of a coincidence matrix [7, 7]; not a number where all ratings are equal."""
    n_c = o.sum(axis=1)
    n = n_c.sum()
    below = np.cumsum(n_c) - n_c / 2  # ratings below the middle of each value
    distance = (below[:, None] - below[None, :]) ** 2
    expected = (np.outer(n_c, n_c) * distance).sum() / (n - 1)
    return float(1 - (o * distance).sum() / expected) if expected > 0 else float("nan")
