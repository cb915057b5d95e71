"""Prompts with their completions, as token ids, and the tensors that a forward pass takes them in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reward.padding_free import Layout, Places

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A prompt and its completions (1 for SFT, 2 for a pair, k for a ranking), as token ids."""

    prompt: list[int]
    completions: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, prompt and completion."""
        return len(self.prompt) + max(map(len, self.completions))

    def rows(self, shared: bool) -> list[tuple[list[int], tuple[list[int], ...]]]:
        """(prompt, completions) of each row that the example takes: one, or one for each completion."""
        return [
            (self.prompt, c) for c in ([self.completions] if shared else ((c,) for c in self.completions))
        ]

    def row_lengths(self, shared: bool) -> list[int]:
        """Tokens of each row; of one with several completions to be scored, at most."""
        return [len(prompt) - 1 + sum(1 + len(c) for c in cs) for prompt, cs in self.rows(shared)]


@dataclass(frozen=True)
class Batch:
    """R rows right-padded to T, or one behind the other in one row of T; K completions (of every example, in
    order) padded to C.

    A row is a prompt without its last token, then for each of its completions a segment: the prompt's last
    token and the completion. Segments see the prompt and not each other, and count positions from the
    prompt's end, so each token has the numbers it would have in a row of its own; and each completion token
    is predicted at a position of its own, so that no gradient is gathered twice from one place. To be scored,
    several completions need no such position, and follow the whole prompt; one alone keeps its row.
    """

    input_ids: Tensor
    """(R, T) long."""
    position_ids: Tensor
    """(R, T) long."""
    segments: Tensor
    """(R, T) long: 0 padding, 1 the shared prompt, then 2, 3, ... Never inferred from ids, so that pad = eos
    would be legal."""
    shared: bool
    """Has a row more than one completion? Else the rows are causal, as any model takes them."""
    reads: Tensor
    """(R, T) bool, True where states are read: where the next token belongs to a completion or, to be scored,
    where this one does; N times, completion by completion."""
    targets: Tensor
    """(N,) long, all completion tokens, one completion after the other."""
    mask: Tensor
    """(K, C) bool, True at completion tokens."""
    lengths: list[int]
    """Tokens of each row."""
    layout: Layout | None
    """Where rows lie one behind the other, what attention has to know of them."""

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        pad: int,
        device: torch.device | str = "cpu",
        shared: bool = False,
        padding_free: bool = False,
        scored: bool = False,
    ) -> "Batch":
        """`shared`: one row for each example, not for each completion; `padding_free`: rows in one row;
        `scored`: states are read of the completions' tokens themselves, not of those that predict them."""
        rows = [row for example in examples for row in example.rows(shared)]
        completions = [completion for example in examples for completion in example.completions]
        columns: tuple[list[Any], ...] = ([], [], [], [])
        lengths: list[int] = []
        for prompt, of_row in rows:
            row = _row(prompt, of_row, scored)
            lengths.append(len(row[0]))
            for column, values in zip(columns, row, strict=True):
                column.extend(values)
        places, several = Places.of_rows(lengths), any(len(of_row) > 1 for _, of_row in rows)
        of_tokens = [torch.tensor(column) for column in columns]

        def padded(column: Tensor, fill: Any) -> Tensor:
            flat = torch.full(places.tokens.shape, fill).index_copy_(0, places.places, column)
            return flat.view(places.shape)

        layout = None
        if padding_free:
            seen = _seen(padded(of_tokens[2], 0).to(device)) if several else None
            layout = Layout(places.to(device), places.to(device), seen)
            in_rows = [column[None] for column in of_tokens]
        else:
            in_rows = [padded(*of) for of in zip(of_tokens, (pad, 0, 0, False), strict=True)]
        mask = torch.arange(max(1, *map(len, completions), 1)) < torch.tensor([[len(c)] for c in completions])
        targets = torch.tensor([token for tokens in completions for token in tokens], dtype=torch.long)
        ids, positions, segments, reads, targets, mask = (t.to(device) for t in (*in_rows, targets, mask))
        return cls(ids, positions, segments, several, reads, targets, mask, lengths, layout)

    def attention_mask(self, additive: torch.dtype | None = None) -> Tensor:
        """(R, T), 1 at tokens; where rows are shared (R, 1, T, T), True where a query may see a key.

        `additive`: 0 and the lowest number of this type instead, for attention that adds the mask.
        """
        if not self.shared:
            return (self.segments > 0).long()
        seen = _seen(self.segments)
        if additive is None:
            return seen
        lowest = torch.finfo(additive).min
        return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, lowest)

    def pad(self, flat: Tensor) -> Tensor:
        """(N,) values of the completion tokens -> (K, C), zero elsewhere."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
            self.mask, flat
        )

    def split(self, states: Tensor) -> list[Tensor]:
        """(T_i, d) of each row, no padding, from the states (R, T, d) of the batch."""
        if self.layout is not None:
            return list(torch.split(states[0], self.lengths))
        return [row[:length] for row, length in zip(states, self.lengths, strict=True)]

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """States of the batch from those of each row: the reverse of `split`."""
        rows = list(rows)
        return pad_sequence(rows, batch_first=True) if self.layout is None else torch.cat(rows)[None]


def _row(prompt: list[int], completions: Sequence[list[int]], scored: bool) -> tuple[list[Any], ...]:
    """Ids, positions, segments of a row, and at which of its tokens states are read."""
    again = 0 if scored and len(completions) > 1 else 1
    start = len(prompt) - again
    ids, positions, segments, reads = prompt[:start], list(range(start)), [1] * start, [False] * start
    for number, completion in enumerate(completions, 2):
        ids += [*prompt[start:], *completion]
        positions += range(start, len(prompt) + len(completion))
        segments += [number] * (again + len(completion))
        of_tokens = [True] * len(completion)
        reads += [False] * again + of_tokens if scored else [*of_tokens, False]
    return ids, positions, segments, reads


def _seen(segments: Tensor) -> Tensor:
    """(R, 1, T, T) bool, True where a query sees a key, from segments (R, T)."""
    queries, keys = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(2 * (segments.shape[1],), dtype=torch.bool, device=keys.device).tril()
    return (causal & ((keys == 1) | (keys == queries)))[:, None]  # padding sees padding: no empty row


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """So many at a time; the last may be fewer."""
    return (items[start : start + size] for start in range(0, len(items), size))


def micro_batches(
    examples: Sequence[Any], max_tokens: int, shared: bool = False, padding_free: bool = False
) -> Iterator[list[int]]:
    """Indices in groups of similar length whose size stays under `max_tokens` (one example at least), padding
    included where there is any.

    Of all cuts of the examples, sorted by length, the one with the least padding, where a group more costs as
    much as OVERHEAD of the budget: small groups pad little, and leave the machine waiting between them. Rows
    without padding are padded in attention still: that costs as ATTENTION says. The order of the groups does
    not matter to a loss that is normalised over the whole step. `examples` have `row_lengths`.
    """
    lengths = [example.row_lengths(shared) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (max(lengths[i]), i))
    cost, starts = [0.0], [0]  # of the best cut of the first examples; where its last group starts
    for end, last in enumerate(order, 1):
        longest, rows, tokens, best = max(lengths[last]), 0, 0, (math.inf, end - 1)
        for start in range(end - 1, -1, -1):
            rows += len(lengths[order[start]])
            tokens += sum(lengths[order[start]])
            size = tokens if padding_free else rows * longest
            if size > max_tokens and start < end - 1:
                break
            attention = rows * longest**2 / ATTENTION if padding_free else 0.0
            best = min(best, (cost[start] + size + attention + OVERHEAD * max_tokens, start))
        cost.append(best[0])
        starts.append(best[1])
    ends = [len(order)]
    while ends[-1] > 0:
        ends.append(starts[ends[-1]])
    for end, start in reversed(list(pairwise(ends))):
        yield order[start:end]


OVERHEAD = 1 / 8
"""Of the token budget: what a micro-batch costs beside its tokens."""

ATTENTION = 1024
"""Tokens of a row at which attention takes about as long as the rest of a layer; of a wide model, more."""
