"""The intervals of the tables: against statsmodels, against numbers worked by hand, and by simulation."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st

from annotate.statistics import (
    Estimate,
    best_of_n_kl,
    mean,
    minimum_detectable_effect,
    paired_difference,
    proportion,
    ratio,
)


def clustered(seed, groups=30, effect=1.0):
    """Rows in clusters of 1 to 5 that share a random effect."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(groups), rng.integers(1, 6, groups))
    return rng.normal(0, effect, groups)[names] + rng.normal(0, 1, len(names)), names


def test_mean_is_that_of_statsmodels_clustered_regression():
    values, names = clustered(0)
    ours = mean(values, names.tolist())
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": names, "df_correction": True}, use_t=True
    )
    assert ours.se == pytest.approx(fit.bse[0], rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)


def test_mean_worked_by_hand():
    # clusters a: 1, 3; b: 5. mean 3; sums of residuals -2 and 2; se² = 2/1 · 8 / 9
    found = mean([1, 3, 5], ["a", "a", "b"])
    assert found.value == 3
    assert found.se == pytest.approx(4 / 3)
    assert found.high - found.value == pytest.approx(12.7062 * 4 / 3, rel=1e-5)  # t at 1 degree of freedom
    assert (found.n, found.clusters) == (3, 2)


def test_repeating_every_row_does_not_narrow_the_interval():
    once = mean([0.1, 0.5, 0.9, 0.4], list("abcd"))
    thrice = mean([0.1, 0.5, 0.9, 0.4] * 3, list("abcd") * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert mean([0.1, 0.5, 0.9, 0.4] * 3).se < once.se  # what ignoring the clusters would have claimed


def test_one_cluster_has_no_interval():
    found = mean([1.0, 2.0], ["a", "a"])
    assert found.value == 1.5
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(proportion([1.0]).low)
    assert math.isnan(minimum_detectable_effect(found))


def test_proportion_is_wilson_when_rows_are_independent():
    # Wilson for 8 of 10 with z = t(9) = 2.2622: z² = 5.1174, effective n = 10 · (1.95996/2.26216)² · (9/10)
    found = proportion([1] * 8 + [0] * 2)
    n = 9 * (1.959964 / 2.262157) ** 2
    centre = (0.8 + 1.959964**2 / (2 * n)) / (1 + 1.959964**2 / n)
    half = 1.959964 / (1 + 1.959964**2 / n) * math.sqrt(0.8 * 0.2 / n + 1.959964**2 / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-5)


def test_proportion_at_the_ends():
    none, every = proportion([0.0] * 400), proportion([1.0] * 400)
    assert none.low == 0 and 0.005 < none.high < 0.012
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)
    clusters = [i // 4 for i in range(400)]
    assert proportion([0.0] * 400, clusters).high > 3 * none.high  # 100 clusters count as 100


def test_proportion_of_clusters_that_agree_counts_clusters():
    values, clusters = [1.0, 0, 1, 1, 0, 1, 0, 1, 1, 1], list("abcdefghij")
    once, repeated = proportion(values, clusters), proportion(values * 5, clusters * 5)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))


def test_paired_difference_cancels_what_prompts_share():
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 10, 50)
    a, b = prompts + 1 + rng.normal(0, 0.1, 50), prompts + rng.normal(0, 0.1, 50)
    found = paired_difference(a, b)
    assert found.value == pytest.approx(1, abs=0.1)
    assert found.high - found.low < 0.1 < mean(a).high - mean(a).low


def test_ratio_worked_by_hand():
    # ratio 3/6; residuals 1 - 1, 3 - 2, 5 - 6 = 0, 1, -1; se = sqrt(3/2 · 2) / 3 / 6... over 3 rows of mean 6
    found = ratio([1, 3, 5], [2, 4, 12])
    assert found.value == 0.5
    assert found.se == pytest.approx(math.sqrt(3 / 2 * 2) / 3 / 6)


def test_ratio_of_a_constant_denominator_is_a_scaled_mean():
    values, names = clustered(2)
    scaled, plain = ratio(values, np.full(len(values), 4.0), names.tolist()), mean(values, names.tolist())
    assert (scaled.low, scaled.high) == pytest.approx((plain.low / 4, plain.high / 4))


def test_minimum_detectable_effect_of_the_textbook():
    # 80 % power for 5 points around 50 % needs about 785 pairs of rows (z² p(1-p) / d² with z = 1.96 + 0.84)
    estimate = Estimate(0.5, 0, 0, math.sqrt(0.25 / 785), 785, 785)
    assert minimum_detectable_effect(estimate) == pytest.approx(0.05, rel=2e-3)


@pytest.mark.parametrize(("n", "nats"), [(1, 0), (4, 0.636), (16, 1.835), (64, 3.175), (1000, 5.909)])
def test_best_of_n_kl(n, nats):
    assert best_of_n_kl(n) == pytest.approx(nats, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean([]), "no values"),
        (lambda: mean([1.0, math.nan]), "not finite"),
        (lambda: mean([1.0, 2.0], ["a"]), "2 values, 1 cluster"),
        (lambda: proportion([0.5, 1.2]), "between 0 and 1"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "pairs"),
        (lambda: ratio([1.0, 1.0], [1.0, -1.0]), "mean 0"),
        (lambda: best_of_n_kl(0), "at least 1"),
    ],
)
def test_refuses_what_has_no_answer(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=60), st.integers(1, 5))
def test_a_share_and_its_interval_stay_between_0_and_1(values, size):
    clusters = [i // size for i in range(len(values))]
    found = proportion(values, clusters)
    if found.clusters > 1:
        assert 0 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1


def coverage(trials, groups):
    """Share of trials in which the interval holds the true mean, the true share and the true ratio."""
    rng = np.random.default_rng(groups)
    held = np.zeros(3)
    for _ in range(trials):
        names = np.repeat(np.arange(groups), rng.integers(1, 6, groups))
        shared = rng.normal(0, 1, groups)[names]
        values = shared + rng.normal(0, 1, len(names))
        wins = (values > 0.5244 * math.sqrt(2)).astype(float)  # true share 0.3
        for index, (found, truth) in enumerate(
            [
                (mean(values, names.tolist()), 0),
                (proportion(wins, names.tolist()), 0.3),
                (ratio(values + 2, 4 + shared, names.tolist()), 0.5),
            ]
        ):
            held[index] += found.low <= truth <= found.high
    return held / trials


def test_intervals_cover():
    assert np.all(np.abs(coverage(600, groups=60) - 0.95) < 0.035)  # 4 standard errors of the simulation


@pytest.mark.soak
@pytest.mark.parametrize("groups", [12, 40, 400])
def test_intervals_cover_closely(groups):
    assert np.all(np.abs(coverage(10_000, groups) - 0.95) < 0.02)
