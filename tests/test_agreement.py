"""Agreement against numbers worked by hand and against evalica."""

import math

import evalica
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate.agreement import first_shown_wins, krippendorff_alpha, raw_agreement


def test_raw_agreement_counts_pairs_by_verdict() -> None:
    # 3 and 1 agree (first); 0 and 0 agree (tie); of (2, -1, 1) only 2 and 1 agree; one rating makes no pair
    found = raw_agreement([[3, 1], [0, 0], [2, -1, 1], [3]])
    assert found is not None
    assert found.value == pytest.approx(3 / 5)
    assert (found.n, found.clusters) == (5, 3)
    assert 0 < found.low < 0.6 < found.high < 1
    assert raw_agreement([[1], [2]]) is None


def test_alpha_by_hand() -> None:
    # Coincidences o(-1,-1) = 2, o(1,1) = 2, o(-1,1) = o(1,-1) = 1, so n(-1) = n(1) = 3 and n = 6.
    # Two values only, so the distance cancels: observed 2/6, expected 2*3*3/(6*5) = 18/30; alpha = 1 - 20/36.
    found = krippendorff_alpha([[-1, -1], [1, 1], [-1, 1]])
    assert found is not None
    assert found.value == pytest.approx(4 / 9)
    assert found.low <= found.value <= found.high


def test_alpha_is_one_for_equal_and_below_zero_for_opposite_ratings() -> None:
    perfect = krippendorff_alpha([[v, v] for v in range(-3, 4)])
    opposite = krippendorff_alpha([[v, -v] for v in (-3, -2, -1, 1, 2, 3)])
    assert perfect is not None and opposite is not None
    assert perfect.value == pytest.approx(1) and perfect.low == pytest.approx(1)
    assert opposite.value < 0


def test_alpha_is_undefined_without_pairs_or_without_variety() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[1], [2]]) is None
    assert krippendorff_alpha([[2, 2], [2, 2]]) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=4), min_size=3, max_size=12))
def test_alpha_equals_evalicas(tasks: list[list[int]]) -> None:
    found = krippendorff_alpha(tasks, resamples=10)
    if found is not None:
        table = pd.DataFrame({i: pd.Series(ratings, dtype=float) for i, ratings in enumerate(tasks)})
        assert found.value == pytest.approx(evalica.alpha(table, "ordinal").alpha, abs=1e-9)


def test_the_interval_of_alpha_is_repeatable_and_narrows_with_tasks() -> None:
    few = [[1, 2], [-2, -1], [0, 1], [3, 3], [-3, 1]]
    one, two, many = (krippendorff_alpha(tasks) for tasks in (few, few, few * 20))
    assert one is not None and one == two and many is not None
    assert many.high - many.low < (one.high - one.low) / 3


def test_leaning_to_the_first_shown() -> None:
    # (task, canonical preference, order shown): the first shown wins a and b and loses c; the tie is left out
    rows = [("a", 2, [0, 1]), ("b", -1, [1, 0]), ("c", 3, [1, 0]), ("d", 0, [0, 1])]
    found = first_shown_wins(rows)
    assert found is not None and found.value == pytest.approx(2 / 3) and found.n == 3
    assert first_shown_wins(rows[3:]) is None


def test_a_single_task_has_no_interval() -> None:
    found = krippendorff_alpha([[1, 2, -3]])
    assert found is not None and math.isnan(found.low)
