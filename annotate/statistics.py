"""Intervals for everything a table shows: means, shares, differences and ratios, clustered by prompt.

Replies to the same prompt are not independent, so the unit of all intervals is the cluster (the prompt): see
Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640, section 2.2). With G clusters and n rows

    se² = G/(G-1) · Σ_g (Σ_i∈g (x_i - mean))² / n²

where G/(G-1) and Student's t at G-1 degrees of freedom, which matter below some 30 prompts, are those of
statsmodels' clustered regression. Every interval says how far the result could move with other prompts from
the same source; the spread over training seeds is a different question and is shown as a number of its own.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

Floats = Sequence[float] | NDArray[np.float64]
Clusters = Sequence[Hashable] | NDArray[np.int64] | None
"""One name for each row; None: every row is a cluster of its own."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. With a single cluster `se`, `low` and `high` are not a number."""

    value: float
    low: float
    high: float
    se: float
    n: int
    """Rows."""
    clusters: int


def mean(values: Floats, clusters: Clusters = None, level: float = 0.95) -> Estimate:
    """Mean of `values` [n] with its cluster-robust interval. Raises ValueError if there are no values."""
    x, names, groups = _aligned(values, clusters)
    value = float(x.mean())
    se = _clustered_se(x - value, names, groups)
    half = _t(groups, level) * se
    return Estimate(value, value - half, value + half, se, len(x), groups)


def proportion(values: Floats, clusters: Clusters = None, level: float = 0.95) -> Estimate:
    """Share with a Wilson interval: `values` [n] in 0..1, where a tie may count half.

    Clustering enters as an effective sample size, p(1-p)/se², shrunk by (z/t)² for few clusters (Korn and
    Graubard 1998). At exactly 0 or 1 the data cannot tell how rows of a cluster depend on one another, so a
    cluster counts as one row.
    """
    x, names, groups = _aligned(values, clusters)
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"a share needs values between 0 and 1; found {x.min():g} to {x.max():g}")
    share = float(x.mean())
    se = _clustered_se(x - share, names, groups)
    if groups == 1:
        return Estimate(share, math.nan, math.nan, se, len(x), groups)
    effective = min(float(len(x)), share * (1 - share) / se**2) if se > 0 else float(groups)
    effective *= (stats.norm.ppf(0.5 + level / 2) / _t(groups, level)) ** 2
    low, high = proportion_confint(share * effective, effective, alpha=1 - level, method="wilson")
    low, high = float(low) if share > 0 else 0.0, float(high) if share < 1 else 1.0  # 0, not 1e-18
    return Estimate(share, low, high, se, len(x), groups)


def paired_difference(a: Floats, b: Floats, clusters: Clusters = None, level: float = 0.95) -> Estimate:
    """Mean of a - b, where a[i] and b[i] answer the same prompt: what the prompts share cancels out."""
    return mean(_subtract(a, b), clusters, level)


def ratio(
    numerators: Floats, denominators: Floats, clusters: Clusters = None, level: float = 0.95
) -> Estimate:
    """mean(numerators) / mean(denominators), both measured on the same rows.

    Interval by linearisation (the delta method): the clustered se of numerator - ratio · denominator, divided
    by the mean denominator; good while that mean is several of its own standard errors away from 0.
    """
    top, names, groups = _aligned(numerators, clusters)
    bottom = np.asarray(denominators, dtype=np.float64)
    if bottom.shape != top.shape:
        raise ValueError(f"{len(top)} numerators, {len(bottom)} denominators")
    if bottom.mean() == 0:
        raise ValueError("the denominators have mean 0")
    value = float(top.mean() / bottom.mean())
    se = _clustered_se(top - value * bottom, names, groups) / abs(float(bottom.mean()))
    half = _t(groups, level) * se
    return Estimate(value, value - half, value + half, se, len(top), groups)


def minimum_detectable_effect(estimate: Estimate, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true effect that a two-sided test with this se finds with probability `power`."""
    if estimate.clusters < 2:
        return math.nan
    t = stats.t(estimate.clusters - 1)
    return float((t.ppf(0.5 + level / 2) + t.ppf(power)) * estimate.se)


def best_of_n_kl(n: int) -> float:
    """Upper bound on KL(best-of-n || its policy), nats per reply: ln n - (n-1)/n.

    Near exact where no single reply is likely, else only a bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"best of {n}: n is at least 1")
    return math.log(n) - (n - 1) / n


def _clustered_se(residuals: NDArray[np.float64], names: NDArray[np.int64], groups: int) -> float:
    if groups < 2:
        return math.nan
    sums = np.bincount(names, weights=residuals, minlength=groups)
    return float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / len(residuals))


def _t(groups: int, level: float) -> float:
    return float(stats.t.ppf(0.5 + level / 2, groups - 1)) if groups > 1 else math.nan


def _aligned(values: Floats, clusters: Clusters) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Values, the number of each one's cluster, and how many clusters there are."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values: an estimate needs at least one")
    if not np.isfinite(x).all():
        raise ValueError("a value is not finite")
    if clusters is None:
        return x, np.arange(len(x)), len(x)
    if len(clusters) != len(x):
        raise ValueError(f"{len(x)} values, {len(clusters)} cluster names")
    if isinstance(clusters, np.ndarray):
        found, names = np.unique(clusters, return_inverse=True)
        return x, names, len(found)
    number: dict[Hashable, int] = {}
    names = np.array([number.setdefault(name, len(number)) for name in clusters], dtype=np.int64)
    return x, names, len(number)


def _subtract(a: Floats, b: Floats) -> NDArray[np.float64]:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: pairs need as many of both")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
