"""Where the prompt ends: whole turns, whole words."""

from hypothesis import given
from hypothesis import strategies as st

from stages.turns import Turn, Unusable, split_turns, split_words, transcript

WORD = st.text("abcé\u2019-", min_size=1, max_size=5)
SAID = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
SPACE = st.sampled_from([" ", "  ", "\n", "\n\n"])


@st.composite
def conversations(draw) -> list[Turn]:
    pairs = draw(st.lists(st.tuples(SAID, SAID), max_size=3))
    turns = [turn for asked, told in pairs for turn in (Turn("user", asked), Turn("assistant", told))]
    return [*turns, Turn("user", draw(SAID))]


def as_transcript(turns: list[Turn]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)


@given(conversations(), SAID, SAID)
def test_a_transcript_is_split_at_the_last_common_turn_of_the_assistant(prompt, chosen, rejected):
    sides = [transcript(as_transcript([*prompt, Turn("assistant", reply)])) for reply in (chosen, rejected)]
    if chosen == rejected:
        return
    assert split_turns(*sides) == (prompt, chosen, rejected)


@given(conversations(), conversations())
def test_the_prompt_is_made_of_whole_turns_that_both_sides_share(one, other):
    chosen, rejected = [*one, Turn("assistant", "yes")], [*other, Turn("assistant", "no")]
    try:
        prompt, yes, no = split_turns(chosen, rejected)
    except Unusable:
        assert one != other
        return
    assert prompt == chosen[: len(prompt)] == rejected[: len(prompt)]
    assert [*prompt, Turn("assistant", yes)] == chosen and [*prompt, Turn("assistant", no)] == rejected


@given(st.lists(st.tuples(WORD, SPACE)), st.lists(st.tuples(WORD, SPACE)), st.lists(st.tuples(WORD, SPACE)))
def test_texts_are_never_split_inside_a_word(common, rest, other_rest):
    chosen, rejected = ("".join(a + b for a, b in [*common, *tail]) for tail in (rest, other_rest))
    if chosen == rejected:
        return
    try:
        prompt, yes, no = split_words(chosen, rejected)
    except Unusable:
        first = [side.split()[:1] for side in (chosen, rejected)]
        assert first[0] != first[1] or min(len(chosen.split()), len(rejected.split())) <= 1
        return
    assert prompt + yes == chosen and prompt + no == rejected
    assert prompt[-1].isspace()
    assert prompt.split() == chosen.split()[: len(prompt.split())] == rejected.split()[: len(prompt.split())]


def test_a_word_that_begins_alike_belongs_to_the_replies():
    assert split_words("The sky is blue.", "The sky is black.") == ("The sky is ", "blue.", "black.")


def test_only_paragraphs_open_a_turn():
    text = "\n\nHuman: Say 'Assistant: hi'.\n\nAssistant: hi\nHuman: no turn\n\nAnd so on."
    assert [turn.role for turn in transcript(text)] == ["user", "assistant"]
    assert transcript("An essay.\n\nHuman: nature") is None
