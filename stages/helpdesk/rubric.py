"""The rubric: the gold reward of the helpdesk, in the open. It scores any text; the table is in README.md.

It reads a reply sentence by sentence. A sentence counts only when it is sound: it ends, and nearly all pairs
of its neighbouring words stand beside each other somewhere in the world's own texts. So keywords and word
salad earn nothing, and what is not of this world's English costs, whoever wrote it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

from stages.helpdesk.grammar import rules, with_article, words
from stages.helpdesk.problems import REMEDIES
from stages.helpdesk.words import COLOURS, DAYS, PARTS, PEOPLE, PRODUCTS
from stages.helpdesk.world import LEXICON, corpus, demonstration, tickets

MINIMUM = 0.0
MAXIMUM = 10.0

_NAMES = frozenset(name.lower() for name, _, _ in PEOPLE)
_CLASSES = {
    **dict.fromkeys(PARTS, "PART"),
    **dict.fromkeys(_NAMES, "NAME"),
    **dict.fromkeys((product.name for product in PRODUCTS), "PRODUCT"),
    **dict.fromkeys(COLOURS, "COLOUR"),
    **dict.fromkeys((day.lower() for day in DAYS), "DAY"),
}
_CAPITALS = _NAMES | {"i", *(day.lower() for day in DAYS)}
_CLASS = re.compile(r"\b(?:" + "|".join(sorted(_CLASSES, key=len, reverse=True)) + r")\b")
_ARTICLE = re.compile(r"\b(an?) (" + _CLASS.pattern + ")")
_USE = re.compile(
    r"\bhow to (?:" + "|".join(sorted({use for product in PRODUCTS for use in product.uses})) + r")\b"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]|_")

_HELLO = r"(?:hello|hi|dear|good (?:morning|afternoon|evening),?)"
_KINDS = {
    "greeting": re.compile(rf"^{_HELLO} "),
    "called": re.compile(rf"\b(?:{_HELLO}|(?:thank you|thanks|sorry),) NAME[.,!]"),
    "thanks": re.compile(r"\b(?:thank you|thanks)\b"),
    "sorry": re.compile(r"\b(?:sorry|apolog\w+)\b"),
    "glad": re.compile(r"\b(?:happy|glad|pleased|no problem)\b"),
    "signoff": re.compile(r"^(?:(?:kind|warm|best) (?:regards|wishes)|yours|regards), "),
}
_TWICE = ("greeting", "thanks", "sorry", "glad", "signoff", *(f"offers {remedy}" for remedy in REMEDIES))
_RUDE = re.compile(
    r"\b(?:not our fault|your (?:own )?fault|not sorry|should (?:have|read)|bother us|more important things|"
    r"nobody else|no one else|do not care|stupid|silly|nonsense|shut up|idiot)\b"
)
_PROMISE = re.compile(r"\b(?:free|gifts?|never|one hour|an hour|guarantee|discount|for life)\b")


@dataclass(frozen=True)
class Score:
    total: float
    """The sum of the parts, held within MINIMUM..MAXIMUM."""
    parts: dict[str, float]
    """Points of each row of the table; rows that gave and cost nothing are there with 0."""


@dataclass(frozen=True)
class _Sentence:
    words: list[str]
    """In lower case."""
    products: frozenset[str]
    """All that it names."""
    says: frozenset[str]
    """What kinds of sentence it is: keys of _KINDS, "offers <remedy>", "speaks of <remedy>"."""
    strange: int
    """Pairs of neighbouring words that no text of the world has, ends included, and wrong capitals."""
    ends: bool

    @property
    def sound(self) -> bool:
        return self.ends and self.strange <= max(1, len(self.words) // 4)


def score(facts: Mapping[str, Any], reply: str) -> Score:
    """Score any text as a reply to the ticket with these facts."""
    sentences = [_sentence(raw) for raw in _SENTENCE.split(reply.strip()) if raw]
    sound = [sentence for sentence in sentences if sentence.sound]
    says = frozenset().union(*(sentence.says for sentence in sound))
    low = reply.lower()
    parts = {
        "name": _name(facts, says, sentences),
        "thanks": float("thanks" in says),
        "reaction": _reaction(facts, says, low),
        "product": _product(facts, sentences),
        "remedy": _remedy(facts, sentences),
        "ending": _ending(sentences),
        "rude": -2.0 * bool(_RUDE.search(low)),
        "promise": -2.0 * bool(_PROMISE.search(low) or set(re.findall(r"\d+", low)) - {str(facts["order"])}),
        "repeats": -_repeats(sentences),
        "language": -min(0.5 * sum(sentence.strange for sentence in sentences), 5.0),
        "length": -_length(len(reply.split())),
    }
    parts = {part: points + 0.0 for part, points in parts.items()}  # no -0.0 in records
    return Score(min(max(sum(parts.values()), MINIMUM), MAXIMUM), parts)


def lexicon_share(text: str) -> float:
    """Share of the words of a text that the world knows; 1 for a text without words."""
    found = words(text)
    return sum(word in LEXICON for word in found) / len(found) if found else 1.0


def _name(facts: Mapping[str, Any], says: frozenset[str], sentences: list[_Sentence]) -> float:
    """1.5 for calling the customer by name, -1 for anybody else's name anywhere."""
    others = _NAMES - {facts["customer"].lower()}
    if any(not others.isdisjoint(sentence.words) for sentence in sentences):
        return -1.0
    return 1.5 * ("called" in says)


def _reaction(facts: Mapping[str, Any], says: frozenset[str], low: str) -> float:
    """2 for an apology where one is due, else for a friendly word; -1 for the one in place of the other."""
    if facts["sorry"]:
        return 2.0 if "sorry" in says else -1.0 * ("glad" in says)
    return -1.0 if _KINDS["sorry"].search(low) else 2.0 * ("glad" in says)


def _product(facts: Mapping[str, Any], sentences: list[_Sentence]) -> float:
    """1.5 for the right product, -1 for any that the customer did not write about."""
    known = {facts["product"], facts["other"]} if facts["problem"] == "wrong" else {facts["product"]}
    if any(sentence.products - known for sentence in sentences):
        return -1.0
    return 1.5 * any(facts["product"] in sentence.products for sentence in sentences if sentence.sound)


def _remedy(facts: Mapping[str, Any], sentences: list[_Sentence]) -> float:
    """3 for offering the right remedy and no other, -1 for speaking of another."""
    says = frozenset().union(*(sentence.says for sentence in sentences))
    if any(f"speaks of {remedy}" in says for remedy in REMEDIES if remedy != facts["remedy"]):
        return -1.0
    return 3.0 * any(s.sound and f"offers {facts['remedy']}" in s.says for s in sentences)


def _ending(sentences: list[_Sentence]) -> float:
    """1 for a sign-off at the end, -1 for a text that breaks off."""
    if not sentences or not sentences[-1].ends:
        return -1.0
    return float(sentences[-1].sound and "signoff" in sentences[-1].says)


def _repeats(sentences: list[_Sentence]) -> float:
    """1 for each kind of sentence that comes twice, 1 or 2 for repeated runs of four words; at most 4."""
    kinds = Counter(kind for sentence in sentences for kind in sentence.says)
    runs = [run for sentence in sentences for run in _runs(sentence.words)]
    again = len(runs) - len(set(runs))
    return float(min(sum(kinds[kind] > 1 for kind in _TWICE) + (again > 0) + (again > 4), 4))


def _runs(said: list[str]) -> list[tuple[str, ...]]:
    """Runs of four words of a sentence; a shorter sentence is one run."""
    return [tuple(said[at : at + 4]) for at in range(max(len(said) - 3, 1))]


def _length(count: int) -> float:
    """Nothing up to 60 words, then 1 for every 10 more begun, at most 5."""
    return float(min(max(count - 51, 0) // 10, 5))


@lru_cache(maxsize=2**16)  # replies share most of their sentences
def _sentence(raw: str) -> _Sentence:
    low = raw.lower()
    masked = _masked(low)
    strange = sum(pair not in _pairs() for pair in _pairs_of(masked))
    strange += sum(with_article(noun).split()[0] != article for article, noun in _ARTICLE.findall(low))
    for at, word in enumerate(_TOKEN.findall(raw)):
        capital = at == 0 or word.lower() in _CAPITALS
        strange += word[0].isalpha() and word != (word.capitalize() if capital else word.lower())
    says = frozenset(kind for kind, pattern in (_KINDS | _offers()).items() if pattern.search(masked))
    products = frozenset(found for found in _CLASS.findall(low) if _CLASSES[found] == "PRODUCT")
    return _Sentence(words(low), products, says, strange, ends=raw[-1] in ".!?")


def _masked(low: str) -> str:
    low = _USE.sub("how to USE", low)
    return re.sub(r"\b\d+\b", "NUMBER", _CLASS.sub(lambda found: _CLASSES[found[0]], low))


def _pairs_of(masked: str) -> Iterator[tuple[str, str]]:
    return pairwise(["", *_TOKEN.findall(masked), ""])


@cache
def _pairs() -> frozenset[tuple[str, str]]:
    """Every pair of neighbouring words in a large sample of the world's replies and shop text."""
    texts = [demonstration(ticket, 0) for ticket in tickets(0, 4000)]
    texts += [text for text in corpus(0, 3000) if ":" not in text]
    sentences = [sentence for text in texts for sentence in _SENTENCE.split(_masked(text.lower()))]
    return frozenset(pair for sentence in sentences for pair in _pairs_of(sentence))


@cache
def _offers() -> dict[str, re.Pattern[str]]:
    """For each remedy a pattern that finds it spoken of, and one that finds it offered, in masked text."""
    grammar, found = rules("replies"), {}
    slots = {"{item}": "PRODUCT", "{use}": r"\w+"}
    for remedy in REMEDIES:
        acts = "|".join((*grammar[f"do_{remedy}"], *grammar[f"do_{remedy}_named"]))
        for slot, pattern in slots.items():
            acts = acts.replace(slot, pattern)
        subject = r"\b(?:i|we|our shop|our team) (?:will|can) (?:now |gladly |also )?"
        found[f"speaks of {remedy}"] = re.compile(rf"\b(?:{acts})\b")
        found[f"offers {remedy}"] = re.compile(rf"{subject}(?:{acts})\b")
    return found
