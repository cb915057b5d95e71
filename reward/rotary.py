"""Rotary positions (Su et al. 2021, "RoFormer", 3.4.2) on a CPU in fewer passes over queries and keys.

A model's own function turns the halves of a head by slices, negation and concatenation, for which autograd
adds zeros and copies. Here each direction is a product, a flip of the halves, and a product that is added.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
"""What transformers calls that function, in the module of each architecture that has it."""

Turned = tuple[Tensor, Tensor, Tensor]


def turns(trunk: nn.Module) -> bool:
    """Is there such a function beside the trunk's class?"""
    return hasattr(sys.modules[type(trunk).__module__], NAME)


@contextmanager
def rotating(trunk: nn.Module) -> Iterator[None]:
    """Inside, a pass of the trunk turns its queries and keys as above.

    Not where activations are checkpointed: in backward a layer runs again, when this is over, and has to keep
    what it kept the first time.
    """
    if getattr(trunk, "is_activation_checkpointing", False):
        yield
        return
    module = sys.modules[type(trunk).__module__]
    plain = getattr(module, NAME)
    setattr(module, NAME, _Rotation(plain))
    try:
        yield
    finally:
        setattr(module, NAME, plain)


class _Rotation:
    """Stands for the model's function during one pass, all layers of which turn by the same angles."""

    def __init__(self, plain: Callable[..., tuple[Tensor, Tensor]]):
        self.plain = plain
        self.known: dict[tuple[int, int, int], tuple[Tensor, Tensor, Turned]] = {}

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        """Queries and keys (B, H, N, D), turned; cos and sin (B, N, D), or of one row for all."""
        if more or named or not all(_fits(states, cos) for states in (q, k)):
            return self.plain(q, k, cos, sin, *more, **named)
        return tuple(_Turn.apply(x, *self._of_heads(x, cos, sin)) for x in (q, k))  # type: ignore[no-untyped-call]

    def _of_heads(self, states: Tensor, cos: Tensor, sin: Tensor) -> Turned:
        """(B * N * H, D) factors of the states, and (B * N * H, 2, D / 2) of their halves, flipped; for both
        directions."""
        rows, heads, length, width = states.shape
        key = id(cos), id(sin), heads  # both are kept, so that their ids are not another's
        if key not in self.known:
            own, other = (x[:, :, None].expand(rows, length, heads, width) for x in (cos, sin))
            flipped = other.reshape(-1, 2, width // 2) * torch.tensor([[-1.0], [1.0]])
            self.known[key] = cos, sin, (own.reshape(-1, width), flipped, flipped.flip(1))
        return self.known[key][2]


def _fits(states: Tensor, cos: Tensor) -> bool:
    return (
        states.device.type == "cpu"
        and states.dtype is cos.dtype is torch.float32
        and states.shape[2:] == cos.shape[1:]
        and cos.shape[0] in (1, states.shape[0])
    )


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, own: Tensor, flipped: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(own, back)
        return _turned(states, own, flipped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grads[0], *ctx.saved_tensors), None, None, None


def _turned(states: Tensor, own: Tensor, flipped: Tensor) -> Tensor:
    rows, heads, length, width = states.shape
    flat = states.transpose(1, 2).reshape(-1, width)  # as it lies in memory
    found = flat * own
    found.view(flipped.shape).addcmul_(flat.view(flipped.shape).flip(1), flipped)
    return found.view(rows, length, heads, width).transpose(1, 2)
