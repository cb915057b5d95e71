"""Measures of a reward model: by hand, and trivial judges on data they can and cannot learn."""

import pytest

from annotate.statistics import proportion
from reward.metrics import accuracy, bag_of_words, longer_wins
from tests.tiny import judgement


def test_accuracy_by_hand():
    preferences = [1, -2, 3, -1, 0, None]
    rows = [judgement(i, "a", "b", p) for i, p in enumerate(preferences)]
    found = accuracy(rows, [0.5, 0.5, 2.0, 0.0, 9.0, 9.0])  # right, wrong, right, half; two undecided
    assert (found.value, found.n) == (pytest.approx(2.5 / 4), 4)
    assert found.low < found.value < found.high


def test_the_interval_is_clustered_by_prompt():
    rows = [judgement(i // 3, "a", "b", 1) for i in range(60)]
    differences = [1.0 if i // 3 % 3 else -1.0 for i in range(60)]  # all judgements of a prompt agree
    right = [float(d > 0) for d in differences]
    clustered = accuracy(rows, differences)
    as_if_independent = proportion(right, [str(i) for i in range(60)])
    assert clustered.high - clustered.low > 1.4 * (as_if_independent.high - as_if_independent.low)


def test_longer_wins_counts_characters():
    rows = [judgement(0, "long text", "short", 1), judgement(1, "a", "bb", 2), judgement(2, "aa", "bb", -1)]
    assert longer_wins(rows).value == pytest.approx(0.5)


def test_a_bag_of_words_learns_a_word_and_not_chance():
    kind = [judgement(i, "we are sorry today", "no we will not", (1, -1)[i % 2]) for i in range(0, 80, 2)]
    rude = [judgement(i, "no we will not", "we are sorry today", -1) for i in range(1, 81, 2)]
    assert bag_of_words(kind + rude, kind[:10] + rude[:10]).value == 1.0


def test_a_bag_of_words_with_nothing_to_learn_is_chance():
    same = [judgement(i, "good", "bad", 1) for i in range(10)]
    assert bag_of_words(same, same).value == 0.5
    assert bag_of_words([], same).value == 0.5
