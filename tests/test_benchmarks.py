"""The benchmarks measure what they say: both sides train on the same batches to the same losses."""

from dataclasses import replace

import pytest

from tests.benchmarks.training import CASES, HEADS, interval, line, measure, short_rows, synthetic_rows


def small(name):
    return replace(CASES[name], hidden=64, layers=1, vocabulary=8192, examples=12, batch=4)


@pytest.mark.parametrize("name", ["sft, default", "dpo", "dpo, reference before", "rm"])
def test_both_sides_have_the_same_losses(name):
    rows = [tuple(ids[:40] for ids in row) for row in synthetic_rows(12)]
    found = {side: [measure(side, small(name), rows)] for side in ("trl", "ours")}
    assert len(found["ours"][0]["losses"]) == 3
    assert found["ours"][0]["losses"] == pytest.approx(found["trl"][0]["losses"], abs=1e-4)
    cells = line(name, small(name), found)
    assert len(cells) == len(HEADS) and cells[-1].endswith("over 3 steps")


def test_a_setting_of_trl_that_makes_its_own_batches():
    found = {
        side: [measure(side, small("sft, grouped by length"), short_rows(12))] for side in ("trl", "ours")
    }
    assert line("x", small("sft, grouped by length"), found)[-1] == "other batches"


def test_interval_of_ratios():
    ratio, low, high = interval([2.0, 8.0, 4.0])
    assert ratio == pytest.approx(4) and low < 4 < high and low * high == pytest.approx(16)
