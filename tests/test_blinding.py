"""The check that warns before labelling where texts give away who wrote them."""

import pytest

from annotate.blinding import FEWEST, giveaways
from annotate.records import Item, Message, draw, prompt_id


def item(number, texts, policies):
    prompt = [Message(role="user", content=f"question {number}")]
    row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
    return Item(**row, completions=texts, policies=policies)


def words(number, who):
    return " ".join(f"word{int(50 * draw('text', str(number), who, i))}" for i in range(12))


def pairs(count, sign=""):
    """Two policies of the same words; the second may sign its replies, and stands first half of the time."""
    made = []
    for n in range(count):
        rows = [("a", words(n, "a")), ("b", f"{words(n, 'b')} {sign}".strip())]
        rows.sort(reverse=n % 2 == 0)
        made.append(item(n, [text for _, text in rows], [policy for policy, _ in rows]))
    return made


def test_a_phrase_that_one_policy_has_is_found():
    [found] = giveaways(pairs(100, sign="Yours, ModelB."))
    assert found.policies == ("a", "b") and found.accuracy.value > 0.95 and found.serious
    assert set(found.words[:2]) == {"yours,", "modelb."}
    assert str(found).startswith("counting words tells a from b in ") and "'modelb.'" in str(found)


def test_the_same_words_give_nothing_away():
    [found] = giveaways(pairs(200))
    assert not found.serious and found.accuracy.low < 0.5 < found.accuracy.high


@pytest.mark.parametrize("count", [0, FEWEST - 1])
def test_too_few_pairs_say_nothing(count):
    assert giveaways(pairs(count, sign="ModelB")) == []


def test_one_policy_has_nothing_to_hide():
    assert giveaways(item(n, [words(n, "a"), words(n, "b")], ["a", "a"]) for n in range(50)) == []


def test_every_two_of_three_policies_are_compared():
    rows = [item(n, [words(n, w) for w in "abc"], ["x", "y", "z"]) for n in range(30)]
    assert [found.policies for found in giveaways(rows)] == [("x", "y"), ("x", "z"), ("y", "z")]
