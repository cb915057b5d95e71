"""A small grammar: text files of symbols and their alternatives, expanded with facts and a seeded generator.

greeting:                      a symbol
    Hello {name}.              one way to say it; {name} is a fact, or another symbol
    Would you like {a:item}?   {a:x} is x after "a" or "an"
"""

import random
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

Rules = Mapping[str, tuple[str, ...]]

_SLOT = re.compile(r"\{(a:)?(\w+)\}")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@cache
def rules(name: str) -> Rules:
    """The rules in rules/<name>.txt. Lines that start with # are comments."""
    found: dict[str, list[str]] = {}
    symbol = ""
    for line in (Path(__file__).parent / "rules" / f"{name}.txt").read_text("utf-8").splitlines():
        if line.startswith("    "):
            found[symbol].append(line.strip())
        elif line.endswith(":"):
            symbol = line[:-1]
            found[symbol] = []
    return {symbol: tuple(alternatives) for symbol, alternatives in found.items()}


def expand(text: str, rules: Rules, facts: Mapping[str, object], rng: random.Random) -> str:
    """`text` with every slot filled: from the facts where they have it, else by a random alternative."""

    def fill(slot: re.Match[str]) -> str:
        article, name = slot.groups()
        value = str(facts[name]) if name in facts else say(rules, name, facts, rng)
        return with_article(value) if article else value

    return _SLOT.sub(fill, text)


def say(rules: Rules, symbol: str, facts: Mapping[str, object], rng: random.Random) -> str:
    """One random way to say the symbol."""
    return expand(rng.choice(rules[symbol]), rules, facts, rng)


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(sentences: Iterable[str]) -> str:
    """One line of text; after a greeting that ends in a comma the next sentence goes on in lower case."""
    text = ""
    for sentence in filter(None, sentences):
        if text.endswith(",") and not sentence.startswith("I "):
            sentence = sentence[0].lower() + sentence[1:]
        text += " " * bool(text) + sentence
    return text


def words(text: str) -> list[str]:
    """The words of a text in lower case; slots, numbers and punctuation are left out."""
    return _WORD.findall(_SLOT.sub(" ", text).lower())
