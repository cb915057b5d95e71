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

from reward.batch import Example

E = TypeVar("E", bound=Example)
T = TypeVar("T")


@dataclass(frozen=True)
class Together(Example, Generic[E]):
    """A prompt with the distinct completions of several examples."""

    parts: tuple[E, ...]


def together(examples: Sequence[E]) -> list[E | Together[E]]:
    """The examples, those that completions of one prompt link made one; in order of their first part."""
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    links = [
        (number, len(examples) + places.setdefault((tuple(example.prompt), tuple(completion)), len(places)))
        for number, example in enumerate(examples)
        for completion in example.completions
    ]
    size = len(examples) + len(places)
    graph = coo_array((numpy.ones(len(links)), tuple(zip(*links, strict=True)) or ((), ())), (size, size))
    groups: dict[int, list[E]] = {}
    for example, group in zip(examples, connected_components(graph, directed=False)[1], strict=False):
        groups.setdefault(int(group), []).append(example)
    return [_made_one(group) for group in groups.values()]


def _made_one(group: list[E]) -> E | Together[E]:
    if len(group) == 1:
        return group[0]
    return Together(group[0].prompt, tuple(_distinct(group).values()), tuple(group))


def each_once(examples: Sequence[Example], work: Callable[[list[Example]], list[list[T]]]) -> list[list[T]]:
    """`work` gives a value for each completion; one that comes again under its prompt is given to it once."""
    of_prompts: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for example in examples:
        known = of_prompts.setdefault(tuple(example.prompt), {})
        for completion in map(tuple, example.completions):
            known.setdefault(completion, len(known))
    distinct = [Example(list(prompt), tuple(map(list, known))) for prompt, known in of_prompts.items()]
    found = dict(zip(of_prompts, work(distinct), strict=True))
    return [
        [found[tuple(e.prompt)][of_prompts[tuple(e.prompt)][tuple(c)]] for c in e.completions]
        for e in examples
    ]


def parts(examples: Sequence[Any]) -> list[Any]:
    """What the examples were made of, in order: an example that is of no others is its only part."""
    return [part for example in examples for part in getattr(example, "parts", (example,))]


def of_parts(examples: Sequence[Any], values: Tensor) -> Tensor:
    """(R,) values of the examples' completions -> those of the completions of all parts, in order.

    A product with zeros and ones: the gradient of picking some more than once would add up in any order.
    """
    if not any(isinstance(example, Together) for example in examples):
        return values
    rows, start = [], 0
    for example in examples:
        place = {tuple(completion): start + i for i, completion in enumerate(example.completions)}
        rows += [place[tuple(completion)] for part in parts([example]) for completion in part.completions]
        start += len(example.completions)
    picks = torch.zeros(len(rows), start, dtype=values.dtype, device=values.device)
    picks[torch.arange(len(rows)), rows] = 1
    return picks @ values


def _distinct(examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    """The distinct completions, in order."""
    return {tuple(completion): completion for example in examples for completion in example.completions}
