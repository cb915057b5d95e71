"""Comparisons that share completions, made one example: of K replies to a prompt each is read once, not K - 1
times (Ouyang et al. 2022, "Training language models to follow instructions", 3.5).

It saves time, and a step learns from all that was said of a reply, where comparisons in steps of their own
would come back to it K - 1 times a pass and learn it by heart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reward.batch import Example, chunks

E = TypeVar("E", bound=Example)
T = TypeVar("T")

MOST = 9
"""Completions in one example, the most that were ranked in that paper: attention costs their square."""


@dataclass(frozen=True)
class Together(Example, Generic[E]):
    """A prompt with the distinct completions of several examples."""

    parts: tuple[E, ...]


def together(examples: Sequence[E]) -> list[E | Together[E]]:
    """The examples, those that completions of one prompt link made one, of MOST completions at most."""
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    links = [
        (number, len(examples) + places.setdefault((tuple(example.prompt), tuple(completion)), len(places)))
        for number, example in enumerate(examples)
        for completion in example.completions
    ]
    size = len(examples) + len(places)
    graph = coo_array((numpy.ones(len(links)), tuple(zip(*links, strict=True)) or ((), ())), (size, size))
    groups: dict[int, list[E]] = {}
    _, labels = connected_components(graph, directed=False)  # of the examples, then of the completions
    for example, group in zip(examples, labels[: len(examples)], strict=True):
        groups.setdefault(int(group), []).append(example)
    return [_made_one(part) for group in groups.values() for part in _cut(group)]


def _cut(group: list[E]) -> list[list[E]]:
    """In order, each part with MOST distinct completions at most."""
    cut: list[list[E]] = []
    for example in group:
        if cut and len(_distinct([*cut[-1], example])) <= MOST:
            cut[-1].append(example)
        else:
            cut.append([example])
    return cut


def _made_one(part: list[E]) -> E | Together[E]:
    if len(part) == 1:
        return part[0]
    return Together(part[0].prompt, tuple(_distinct(part).values()), tuple(part))


def each_once(examples: Sequence[Example], work: Callable[[list[Example]], list[list[T]]]) -> list[list[T]]:
    """`work` gives a value for each completion; one that comes again under its prompt is given to it once."""
    of_prompts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for example in examples:
        of_prompts.setdefault(tuple(example.prompt), {}).update(_distinct([example]))
    distinct = [
        Example(list(prompt), tuple(some))
        for prompt, known in of_prompts.items()
        for some in chunks(list(known.values()), MOST)
    ]
    found = {
        (tuple(example.prompt), tuple(completion)): value
        for example, values in zip(distinct, work(distinct), strict=True)
        for completion, value in zip(example.completions, values, strict=True)
    }
    return [[found[tuple(e.prompt), tuple(c)] for c in e.completions] for e in examples]


def parts(examples: Sequence[Any]) -> list[Any]:
    """What the examples were made of, in order: an example that is of no others is its only part."""
    return [part for example in examples for part in getattr(example, "parts", (example,))]


def of_parts(examples: Sequence[Any], values: Tensor) -> Tensor:
    """(R,) values of the examples' completions -> those of the completions of all parts, in order.

    By a mask: the gradient of picking some more than once would add up in any order, and a product with ones
    and zeros would spread what is not finite.
    """
    if not any(isinstance(example, Together) for example in examples):
        return values
    rows, start = [], 0
    for example in examples:
        place = {tuple(completion): start + i for i, completion in enumerate(example.completions)}
        rows += [place[tuple(completion)] for part in parts([example]) for completion in part.completions]
        start += len(example.completions)
    picks = torch.tensor(rows)[:, None] == torch.arange(start)
    return torch.where(picks.to(values.device), values, 0.0).sum(1)


def _distinct(examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    """The distinct completions, in order."""
    return {tuple(completion): completion for example in examples for completion in example.completions}
