"""Attention of short rows in training on a CPU, by whole products.

PyTorch's kernel there (Dao et al. 2022, "FlashAttention") goes through a row 32 queries at a time and never
holds all weights, which a long row needs. Of a short one its products are small and slow, those of backward
most of all, so here they are made of all rows and heads at once, and the weights are kept.
"""

from typing import Any

import torch
from torch import Tensor

LONGEST = 256
"""Keys of a row: the weights kept grow with their square."""


def fits(query: Tensor, key: Tensor, others: dict[str, Any]) -> bool:
    """Is it a short row in training, in fp32 on a CPU, with nothing asked for but a mask and a scale?"""
    return (
        query.requires_grad
        and query.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and query.dtype is key.dtype is torch.float32
        and key.shape[2] <= LONGEST
        and not others.get("dropout")
        and all(others.get(name) is None for name in ("is_causal", "position_bias", "softcap"))
    )


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """(R, Tq, H, D) from queries (R, H, Tq, D), keys and values (R, Hk, Tk, D), where H is a multiple of Hk.

    `bias` (R, 1, Tq, Tk), or of one row for all, is added to the scaled scores: 0, or -inf where a key is not
    seen.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """Products of R * Hk pairs: of a key head with the queries of all H / Hk heads that read it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        pairs = key.shape[0] * key.shape[1]
        q, k, v = (states.reshape(pairs, -1, states.shape[-1]) for states in (query, key, value))
        scores = q.new_empty(*query.shape[:3], key.shape[2]).copy_(bias).view(pairs, -1, key.shape[2])
        weights = torch.softmax(scores.baddbmm_(q, k.mT, alpha=scale), dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(*query.shape[:3], -1).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_query, of_key, of_value = ctx.shapes
        grad = grads[0].transpose(1, 2).reshape(*q.shape[:2], -1)
        of_weights = torch.bmm(grad, v.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        none = q.new_zeros(1, 1, 1)
        return (
            torch.baddbmm(none, of_scores, k, beta=0, alpha=ctx.scale).view(of_query),
            torch.baddbmm(none, of_scores.mT, q, beta=0, alpha=ctx.scale).view(of_key),
            torch.bmm(weights.mT, grad).view(of_value),
            None,
            None,
        )
