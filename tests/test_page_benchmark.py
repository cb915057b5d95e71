"""The benchmark of the labelling page measures what it says: each side stores every label."""

import pytest

from tests.benchmarks.annotate import load, next_pair, p, report


@pytest.mark.parametrize("side", ["plain", "ours", "queue"])
def test_each_side_stores_every_label(side: str) -> None:
    rate, took = load(side, people=2, labels=3)  # counts the labels in the database
    assert rate > 0 and len(took) == 6 and 0 < min(took) <= p(took, 0.5) <= p(took, 0.95)


def test_a_long_list_is_filled_and_worked() -> None:
    assert len(next_pair(tasks=40, steps=10)) == 10
    assert len(next_pair(tasks=40, steps=5, overlap=3, ahead=12)) == 5


def test_the_report_says_how_it_was_made() -> None:
    text = report([("what", "1 ms", "2 ms")])
    assert "python -m tests.benchmarks.annotate" in text and "| what | 1 ms | 2 ms |" in text
