"""Simulated annotators: they read the rubric through noise, tire, and lean to one side, like people.

The verdict on two replies is a draw from Davidson's model (1970), Bradley-Terry with ties: with d the
difference of the perceived worth,  P(first) : P(tie) : P(second) = exp(d/2) : tie : exp(-d/2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from typing import Any

from annotate.records import DataError, draw
from stages.helpdesk.rubric import score


@dataclass(frozen=True)
class Annotator:
    noise: float
    """Points of the rubric that make d = 1: small is a sharp eye."""
    tie: float
    """Davidson's parameter: 1 means that equal replies are called a tie in one case of three."""
    position: float
    """Points that the reply shown first gets for being first."""
    length: float
    """Points for every ten words that a reply is longer."""
    careless: float
    """Share of tasks that are answered at random."""
    skip: float
    """Share of tasks that get no verdict."""


ANNOTATORS: dict[str, Annotator] = {
    "ada": Annotator(noise=1.0, tie=0.6, position=0.0, length=0.0, careless=0.02, skip=0.005),
    "ben": Annotator(noise=1.2, tie=0.4, position=0.4, length=0.3, careless=0.05, skip=0.01),
    "cleo": Annotator(noise=1.5, tie=0.3, position=0.8, length=0.6, careless=0.25, skip=0.02),
}


def judge(annotator: str, seed: int, task: str, facts: Mapping[str, Any], shown: Sequence[str]) -> int | None:
    """The preference -3..3 for two replies as shown: positive if the first is better; None skips the task.

    A function of its arguments alone, whenever and in whatever order the tasks are judged.
    """
    if annotator not in ANNOTATORS:
        raise DataError(f"no simulated annotator {annotator!r}; there are {', '.join(ANNOTATORS)}")
    if len(shown) != 2:
        raise DataError(f"task {task}: {len(shown)} replies; the simulated annotators compare two")
    who = ANNOTATORS[annotator]

    def chance(what: str) -> float:
        return draw(str(seed), "judge", annotator, task, what, *shown)

    if chance("skip") < who.skip:
        return None
    if chance("careless") < who.careless:
        return int(5 * chance("at random")) - 2
    known = tuple(facts.items())
    first, second = (_total(known, reply) + who.length * len(reply.split()) / 10 for reply in shown)
    better = first + who.position - second
    side = _side(better / who.noise, who.tie, chance("side"))
    return side * _strength(side * better, chance("strength"))


@lru_cache(maxsize=2**16)  # each annotator reads the same replies
def _total(facts: tuple[tuple[str, Any], ...], reply: str) -> float:
    return score(dict(facts), reply).total


def _side(d: float, tie: float, at: float) -> int:
    """Davidson's draw: 1, 0 or -1."""
    weights = exp(min(d, 60) / 2), tie, exp(-max(d, -60) / 2)
    at *= sum(weights)
    return 1 if at < weights[0] else 0 if at < weights[0] + weights[1] else -1


def _strength(better: float, at: float) -> int:
    """1 slightly, 2 clearly, 3 much better: points in favour of the choice, read to a quarter either way."""
    seen = better * (0.75 + at / 2)
    return 1 if seen < 2.5 else 2 if seen < 5 else 3
