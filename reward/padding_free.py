"""Rows of different lengths without padding: one behind the other, and in rows again for attention alone.

All that a decoder does beside attention it does to each token by itself, so the tokens of R rows can go
through it as one row of N; attention gets its queries, keys and values in R rows padded to T, and what it
returns is taken out of them. That is what `padding_free` is elsewhere on kernels of NVIDIA's GPUs (Dao 2023,
"FlashAttention-2", variable lengths); here attention is PyTorch's own, so it works on every device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reward import short_attention

NAME = "sdpa_padding_free"


@dataclass(frozen=True)
class Places:
    """Where N tokens, one behind the other, are in R rows padded to T."""

    shape: tuple[int, int]
    """(R, T)."""
    places: Tensor
    """(N,) long, the place of each token among R * T; ascending."""
    tokens: Tensor
    """(R * T,) long, the token at each place; the first one at padding."""

    @classmethod
    def of(cls, places: Tensor, shape: tuple[int, int]) -> "Places":
        tokens = places.new_zeros(shape[0] * shape[1])
        tokens[places] = torch.arange(len(places), device=places.device)
        return cls(shape, places, tokens)

    @classmethod
    def of_rows(cls, lengths: Sequence[int]) -> "Places":
        """Of rows of these lengths, each from its first column on."""
        shape = len(lengths), max(lengths)
        filled = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        return cls.of(filled.flatten().nonzero().squeeze(1), shape)

    def to(self, device: torch.device | str) -> "Places":
        return Places(self.shape, self.places.to(device), self.tokens.to(device))

    def pad(self, states: Tensor) -> Tensor:
        """(1, H, N, D) -> (R, H, T, D); what is at padding must reach nothing that is read."""
        of_tokens = states.transpose(1, 2).squeeze(0)
        if len(of_tokens) != len(self.places):  # a cache, or virtual tokens in front
            raise ValueError(f"attention to {len(of_tokens)} tokens, where rows have {len(self.places)}")
        if len(self.places) < len(self.tokens):
            of_tokens = _Pad.apply(of_tokens, self.tokens, self.places)  # type: ignore[no-untyped-call]
        return of_tokens.reshape(*self.shape, *of_tokens.shape[1:]).transpose(1, 2)

    def unpad(self, rows: Tensor) -> Tensor:
        """(R, T, H, D) -> (1, N, H, D)."""
        of_places = rows.flatten(0, 1)
        if len(self.places) < len(self.tokens):
            of_places = _Unpad.apply(of_places, self.places)  # type: ignore[no-untyped-call]
        return of_places[None]


@dataclass(frozen=True)
class Layout:
    """What attention has to know of rows that lie one behind the other."""

    queries: Places
    keys: Places
    mask: Tensor | None = None
    """(R, 1, Tq, Tk) bool, True where a query sees a key; None: each sees its row up to itself."""

    @cached_property
    def bias(self) -> Tensor:
        """(R, 1, Tq, Tk), or (1, 1, T, T) without a mask: 0 where a query sees a key, else -inf."""
        seen, length = self.mask, self.keys.shape[1]
        if seen is None:
            device = self.keys.places.device
            seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)

    def read_at(self, index: Tensor) -> "Layout":
        """Of queries of some tokens alone, `index` (M,) of all N; keys remain of all."""
        rows, width = self.keys.shape
        row, column = self.keys.places[index] // width, self.keys.places[index] % width
        counts = row.bincount(minlength=rows)
        rank = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[row]
        shape = rows, max(1, int(counts.max()))
        queries = Places.of(row * shape[1] + rank, shape)
        at = column.new_zeros(rows * shape[1]).index_copy(0, queries.places, column).view(shape)
        if self.mask is None:
            seen = torch.arange(width, device=index.device) <= at[:, :, None]
        else:
            seen = self.mask[:, 0].gather(1, at[:, :, None].expand(*shape, width))
        return Layout(queries, self.keys, seen[:, None])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, N, H, D) from queries (1, H, N, D), keys and values; the mask is that of the layout."""
    if others.get("sliding_window") is not None:
        raise NotImplementedError("a sliding window")
    states = layout.queries.pad(query), layout.keys.pad(key), layout.keys.pad(value)
    if getattr(module, "is_causal", True) and short_attention.fits(query, states[1], others):
        rows = short_attention.attention(*states, layout.bias, others.get("scaling"))
    else:
        rows, _ = sdpa_attention_forward(module, *states, layout.mask, **others)
    return layout.queries.unpad(rows), None


AttentionInterface.register(NAME, attention)


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Inside, the model of this config attends by the layout that it is called with."""
    of_text = config.get_text_config()
    kept, of_text._attn_implementation = of_text._attn_implementation, NAME
    try:
        yield
    finally:
        of_text._attn_implementation = kept


class _Pad(torch.autograd.Function):
    """Autograd's own would add what comes back from padding, all zeros, to the first token, one by one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Unpad(torch.autograd.Function):
    """Autograd's own would add into zeros, where no place comes twice and copying does."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, places, grads[0]), None
