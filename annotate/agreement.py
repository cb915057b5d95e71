"""How far annotators agree: share of equal verdicts, Krippendorff's alpha, and which side they lean to.

Preferences are -3..3 with 0 for a tie. All intervals are clustered by task, since labels of one task share
its texts: they say how far the number could move with other tasks and the same people.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from annotate.statistics import Estimate, proportion

Ratings = Iterable[Sequence[int]]
"""For each task the preferences of those who gave one, in canonical order of the completions."""

POINTS = 7
"""Of the scale -3..3."""


Counts = NDArray[np.int64]
"""[tasks, 7]: how often each of -3..3 was given on each task."""


def counted(tasks: Ratings) -> Counts:
    rows = [np.bincount(np.asarray(ratings) + POINTS // 2, minlength=POINTS) for ratings in tasks]
    return np.array(rows, dtype=np.int64).reshape(-1, POINTS)


def raw_agreement(tasks: Ratings) -> Estimate | None:
    """Share of pairs of labels on one task with the same verdict (first, second, tie). None without pairs."""
    return agreement_of(counted(tasks))


def krippendorff_alpha(tasks: Ratings, resamples: int = 1000, level: float = 0.95) -> Estimate | None:
    """Krippendorff's alpha for ordinal ratings, with a percentile interval from resampling tasks.

    alpha = 1 - observed / expected disagreement over the coincidence matrix o of values within tasks
    (Krippendorff, Content Analysis, 2018, chapter 12): 1 is perfect, 0 what chance gives.
    The ordinal distance of two values is the number of ratings between them, squared. None where no task has
    two ratings, or where all ratings are equal.
    """
    return alpha_of(counted(tasks), resamples, level)


def agreement_of(counts: Counts) -> Estimate | None:
    """`raw_agreement` of tasks that are counted already."""
    verdicts = np.stack([counts[:, :3].sum(1), counts[:, 3], counts[:, 4:].sum(1)])
    total = counts.sum(axis=1)
    same = (verdicts * (verdicts - 1) // 2).sum(axis=0)
    other = total * (total - 1) // 2 - same
    names = np.arange(len(counts))
    values = np.repeat([1.0, 0.0], [same.sum(), other.sum()])
    clusters = np.concatenate([np.repeat(names, same), np.repeat(names, other)])
    return proportion(values, clusters) if len(values) else None


def alpha_of(counts: Counts, resamples: int = 1000, level: float = 0.95) -> Estimate | None:
    """`krippendorff_alpha` of tasks that are counted already."""
    counts = counts[counts.sum(axis=1) > 1]
    if len(counts) == 0:
        return None
    # Tasks with the same counts are alike, and of those there are few: a draw says how often it took each.
    alike, times = np.unique(counts, axis=0, return_counts=True)
    flat = np.array([_coincidences(row) for row in alike]).reshape(len(alike), -1)
    o = times @ flat
    value = _alpha(o.reshape(POINTS, POINTS))
    if np.isnan(value):
        return None
    dice = np.random.default_rng(0)  # the same labels give the same interval
    weights = dice.multinomial(len(counts), times / len(counts), size=resamples)
    draws = np.array([_alpha((weight @ flat).reshape(POINTS, POINTS)) for weight in weights])
    spread = draws[~np.isnan(draws)]
    if len(counts) == 1 or len(spread) < 2:
        return Estimate(value, np.nan, np.nan, np.nan, round(float(o.sum())), len(counts))
    low, high = np.quantile(spread, [0.5 - level / 2, 0.5 + level / 2])
    se = float(spread.std(ddof=1))
    return Estimate(value, float(low), float(high), se, round(float(o.sum())), len(counts))


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


def _coincidences(count: Counts) -> NDArray[np.float64]:
    """[7, 7] from [7]: how often value c met value k within one task, each rating counting once in all."""
    return np.asarray((np.outer(count, count) - np.diag(count)) / (count.sum() - 1), dtype=np.float64)


def _alpha(o: NDArray[np.float64]) -> float:
    """Of a coincidence matrix [7, 7]; not a number where all ratings are equal."""
    n_c = o.sum(axis=1)
    n = n_c.sum()
    below = np.cumsum(n_c) - n_c / 2  # ratings below the middle of each value
    distance = (below[:, None] - below[None, :]) ** 2
    expected = (np.outer(n_c, n_c) * distance).sum() / (n - 1)
    return float(1 - (o * distance).sum() / expected) if expected > 0 else float("nan")
