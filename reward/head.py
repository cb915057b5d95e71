"""Log-probabilities from the states below a language model's head, with one tensor of its logits or none; and
those states."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**24
"""Logits, N x V of a forward pass, up to which they are kept for backward, and above made once more."""

CHUNK = 2**20
"""Logits made at a time: 4 MB in fp32, which stays in a core's cache while it is worked on."""

ROWS = 128
"""Of a chunk at least: each chunk reads the whole head, and in backward writes its gradient."""


def head_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """log softmax((states @ weight.T + bias) / temperature)[target]: (N,) fp32 of (N, d), (V, d), (N,), (V,).

    Works in chunks of rows. With g the gradient of a log-probability and p the softmax, the gradient of its
    logits is g (1[target] - p): log p is all that backward needs, and it writes the gradient in its place.
    Autograd would hold three (N, V) tensors; here it is one, or where that were large, one chunk, for one
    more product with the head.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    keep = torch.is_grad_enabled() and targets.numel() * weight.shape[0] <= LARGE
    with torch.autocast(device, enabled=False):
        return _HeadLogprobs.apply(states, weight, bias, targets, temperature, keep)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        keep: bool,
    ) -> Tensor:
        kept = torch.empty(len(targets), weight.shape[0], device=states.device) if keep else None
        found = torch.empty(targets.shape, device=states.device)
        for rows, logps in _chunks(states, weight, bias, temperature, kept):
            found[rows] = logps.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(states, weight, bias, targets, kept)
        ctx.temperature = temperature
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        states, weight, bias, targets, kept = ctx.saved_tensors
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        empty = torch.empty_like if len(targets) else torch.zeros_like  # the first chunk writes over it
        of_weight = empty(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        scale = grad.float() / ctx.temperature
        again = _chunks(states, weight, bias, ctx.temperature)
        for rows, logps in again if kept is None else [(slice(0, len(kept)), kept)]:
            of_logits = logps.exp_().mul_(-scale[rows, None])
            of_logits.scatter_add_(1, targets[rows, None], scale[rows, None])
            of_logits = of_logits.to(states.dtype)
            if of_states is not None:
                torch.mm(of_logits, weight, out=of_states[rows])
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, states[rows], beta=float(rows.start > 0))
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_states, of_weight, of_bias, None, None, None


def _chunks(
    states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their fp32 log-probabilities (n, V), in `kept` or a buffer that the next chunk writes over.

    The temperature divides within the product, which spares a pass over its result.
    """
    size = min(max(ROWS, CHUNK // weight.shape[0]), len(states))
    product = torch.empty(size, weight.shape[0], dtype=states.dtype, device=states.device)
    buffer = torch.empty(product.shape, device=states.device) if kept is None else None
    added, share = (product.new_zeros(1), 0.0) if bias is None else (bias, 1 / temperature)
    for start in range(0, len(states), size or 1):
        rows = slice(start, min(start + size, len(states)))
        n = rows.stop - start
        torch.addmm(added, states[rows], weight.T, beta=share, alpha=1 / temperature, out=product[:n])
        of_rows = kept[rows] if buffer is None else buffer[:n]  # type: ignore[index]
        yield rows, torch.log_softmax(product[:n], 1, dtype=torch.float32, out=of_rows)


class HeadInput:
    """Catches what the language-model head is given, which is what a value head on the same trunk reads."""

    def __init__(self, model: nn.Module, wanted: bool):
        self.wanted, self.model = wanted, model
        self.states = torch.empty(0)

    def __enter__(self) -> "HeadInput":
        if self.wanted:
            head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
            self.hook = head.register_forward_hook(lambda _, inputs, __: self._keep(inputs[0]))
        return self

    def _keep(self, states: Tensor) -> None:
        self.states = states

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            self.hook.remove()
