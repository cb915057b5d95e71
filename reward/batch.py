"""Prompts with their completions, as token ids, and the tensors that a forward pass takes them in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


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
        """Tokens of each row."""
        return [len(prompt) - 1 + sum(1 + len(c) for c in cs) for prompt, cs in self.rows(shared)]


@dataclass(frozen=True)
class Batch:
    """R rows right-padded to T; K completions (of every example, in order) padded to C.

    A row is a prompt without its last token, then for each of its completions a segment: the prompt's last
    token and the completion. Segments see the prompt and not each other, and count positions from the
    prompt's end, so each token has the numbers it would have in a row of its own; and each completion token
    is predicted at a position of its own, so that no gradient is gathered twice from one place.
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
    predicts: Tensor
    """(R, T) bool, True where the next token belongs to a completion; N times, completion by completion."""
    targets: Tensor
    """(N,) long, all completion tokens, one completion after the other."""
    mask: Tensor
    """(K, C) bool, True at completion tokens."""

    @classmethod
    def of(
        cls, examples: Sequence[Example], pad: int, device: torch.device | str = "cpu", shared: bool = False
    ) -> "Batch":
        """`shared`: one row for each example, not for each completion."""
        rows = [row for example in examples for row in example.rows(shared)]
        completions = [completion for example in examples for completion in example.completions]
        width = max(length for example in examples for length in example.row_lengths(shared))
        ids, positions, segments = (torch.full((len(rows), width), fill) for fill in (pad, 0, 0))
        predicts = torch.zeros(len(rows), width, dtype=torch.bool)
        for r, (prompt, of_row) in enumerate(rows):
            parts = [prompt[:-1], *([prompt[-1], *completion] for completion in of_row)]
            starts = [0, *([len(prompt) - 1] * len(of_row))]
            at = 0
            for number, (part, start) in enumerate(zip(parts, starts, strict=True), 1):
                end = at + len(part)
                ids[r, at:end] = torch.tensor(part, dtype=torch.long)
                positions[r, at:end] = torch.arange(start, start + len(part))
                segments[r, at:end] = number
                predicts[r, at : end - 1] = number > 1
                at = end
        mask = torch.arange(max(1, *map(len, completions), 1)) < torch.tensor([[len(c)] for c in completions])
        targets = torch.tensor(
            [token for completion in completions for token in completion], dtype=torch.long
        )
        several = any(len(of_row) > 1 for _, of_row in rows)
        ids, positions, segments, predicts, targets, mask = (
            t.to(device) for t in (ids, positions, segments, predicts, targets, mask)
        )
        return cls(ids, positions, segments, several, predicts, targets, mask)

    def attention_mask(self, additive: torch.dtype | None = None) -> Tensor:
        """(R, T), 1 at tokens; where rows are shared (R, 1, T, T), True where a query may see a key.

        `additive`: 0 and the lowest number of this type instead, for attention that adds the mask.
        """
        if not self.shared:
            return (self.segments > 0).long()
        queries, keys = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(2 * (self.segments.shape[1],), dtype=torch.bool, device=keys.device).tril()
        seen = (causal & ((keys == 1) | (keys == queries)))[:, None]  # padding sees padding: no empty row
        if additive is None:
            return seen
        lowest = torch.finfo(additive).min
        return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, lowest)

    def pad(self, flat: Tensor) -> Tensor:
        """(N,) values of the completion tokens -> (K, C), zero elsewhere."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
            self.mask, flat
        )


def micro_batches(examples: Sequence[Any], max_tokens: int, shared: bool = False) -> Iterator[list[int]]:
    """Indices in groups of similar length whose padded size stays under `max_tokens` (one example at least).

    Of all cuts of the examples, sorted by length, the one with the least padding, where a group more costs as
    much as OVERHEAD of the budget: small groups pad little, and leave the machine waiting between them. The
    order of the groups does not matter to a loss that is normalised over the whole step. `examples` have
    `row_lengths`.
    """
    lengths = [example.row_lengths(shared) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (max(lengths[i]), i))
    cost, starts = [0.0], [0]  # of the best cut of the first examples; where its last group starts
    for end, last in enumerate(order, 1):
        longest, rows, best = max(lengths[last]), 0, (math.inf, end - 1)
        for start in range(end - 1, -1, -1):
            rows += len(lengths[order[start]])
            if rows * longest > max_tokens and start < end - 1:
                break
            best = min(best, (cost[start] + rows * longest + OVERHEAD * max_tokens, start))
        cost.append(best[0])
        starts.append(best[1])
    ends = [len(order)]
    while ends[-1] > 0:
        ends.append(starts[ends[-1]])
    for end, start in reversed(list(pairwise(ends))):
        yield order[start:end]


OVERHEAD = 1 / 8
"""Of the token budget: what a micro-batch costs beside its tokens."""
