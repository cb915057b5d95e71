"""Log-probabilities from the states below a language model's head, without keeping a row of logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGE = 2**22
"""Logits of one forward pass above which they are made in chunks: below, a second product costs more."""

CHUNK = 2**20
"""Logits made at a time: 4 MB in fp32, which stays in a core's cache while it is worked on."""


def head_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """log softmax((states @ weight.T + bias) / temperature)[target]: (N,) fp32 of (N, d), (V, d), (N,), (V,).

    Forward keeps the normalisers alone; backward makes the logits again, chunk by chunk. With g the gradient
    of a log-probability and p the softmax, the gradient of its logits is g (1[target] - p). The peak is one
    chunk where autograd would keep three (N, V) tensors, for one more product with the head in backward.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _HeadLogprobs.apply(states, weight, bias, targets, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        normaliser = torch.empty(targets.shape, device=states.device)
        logps = torch.empty_like(normaliser)
        for rows, logits in _chunks(states, weight, bias, temperature):
            normaliser[rows] = logits.logsumexp(1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normaliser[rows]
        ctx.save_for_backward(states, weight, bias, targets, normaliser)
        ctx.temperature = temperature
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        states, weight, bias, targets, normaliser = ctx.saved_tensors
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        scale = grad.float() / ctx.temperature
        for rows, logits in _chunks(states, weight, bias, ctx.temperature):
            of_logits = logits.sub_(normaliser[rows, None]).exp_().mul_(-scale[rows, None])
            of_logits.scatter_add_(1, targets[rows, None], scale[rows, None])
            of_logits = of_logits.to(states.dtype)
            if of_states is not None:
                torch.mm(of_logits, weight, out=of_states[rows])
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, states[rows])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_states, of_weight, of_bias, None, None


def _chunks(
    states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their fp32 logits, in a buffer that the next chunk writes over."""
    size = max(1, CHUNK // weight.shape[0])
    buffer = torch.empty(min(size, len(states)), weight.shape[0], dtype=states.dtype, device=states.device)
    for start in range(0, len(states), size):
        rows = slice(start, min(start + size, len(states)))
        logits = torch.mm(states[rows], weight.T, out=buffer[: rows.stop - start])
        logits = (logits if bias is None else logits.add_(bias)).float()
        yield rows, logits if temperature == 1.0 else logits.div_(temperature)
