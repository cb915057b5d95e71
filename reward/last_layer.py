"""The last layer at the positions alone whose states are read: of the others it gives keys and values.

A loss reads the states of the completions, or of their last tokens. The layers below are needed everywhere,
since attention reads them; but what the last layer makes of the prompt nobody reads: not its queries, not
what attention gives them, not the MLP's output. Of a pass through L layers up to a share of 1/L goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reward.passes import encodes

WORTH = 0.8
"""Of the positions at most that are read; with more, the keys' pass of its own costs what it spares."""


def layers_of(trunk: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a decoder's layers; outer lists come first, so no list of experts is taken for it."""
    config: Any = trunk.config
    if encodes(trunk):
        return None
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, module in trunk.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


@contextmanager
def reading(trunk: nn.Module, name: str, at: Tensor) -> Iterator[Tensor]:
    """Inside, the trunk's last states are of fewer positions than its rows (R, T), and the mask given finds
    those of `at` (R, T) bool among them, in the same order. `name`: of the trunk's list of layers.

    Where most positions are read nothing is changed, nor where activations are checkpointed: the layer runs
    again in backward, when this is over, and would run whole.
    """
    narrowed = _Narrowed(at)
    if narrowed.width > WORTH * at.shape[1] or getattr(trunk, "is_activation_checkpointing", False):
        yield at
        return
    last: nn.Module = trunk.get_submodule(name)[-1]  # type: ignore[index]
    hook = last.register_forward_pre_hook(narrowed.enter, with_kwargs=True)
    try:
        yield narrowed.read
    finally:
        hook.remove()


class _Narrowed:
    """(R, W) positions of rows (R, T): those that are read, then others of the row, none twice."""

    def __init__(self, at: Tensor):
        self.shape, self.width = at.shape, max(1, int(at.sum(1).max()))
        self.index = (~at).int().argsort(dim=1, stable=True)[:, : self.width]
        self.read = at.gather(1, self.index)
        rows = torch.arange(at.shape[0], device=at.device)[:, None]
        self.flat = (rows * at.shape[1] + self.index).flatten()

    def enter(self, layer: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the layer is called with instead: the states that are read, and keys and values of all."""
        (states,) = args
        keys = _Keys()
        keys.catch(layer, states, kwargs)
        given = {name: self._narrow(value) for name, value in kwargs.items()} | {"past_key_values": keys}
        if "layout" in kwargs:  # rows one behind the other
            given["layout"] = kwargs["layout"].read_at(self.index[0])
        else:
            given["attention_mask"] = self._mask(kwargs["attention_mask"])
        return (self._narrow(states),), given

    def _narrow(self, value: Any) -> Any:
        """(R, W, ...) of a tensor (R, T, ...) or (1, T, ...), or of each in a tuple; else what is given."""
        if isinstance(value, tuple):
            return tuple(map(self._narrow, value))
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.shape[1]:
            return value
        whole = value.expand(self.shape[0], *value.shape[1:])
        found = whole.flatten(0, 1).index_select(0, self.flat)
        return found.view(*self.index.shape, *value.shape[2:])

    def _mask(self, mask: Tensor | None) -> Tensor:
        """(R, 1, W, T), what the queries that are left may see; no mask means all before them."""
        if mask is None:
            return (torch.arange(self.shape[1], device=self.index.device) <= self.index[:, :, None])[:, None]
        rows = mask.expand(self.shape[0], 1, self.shape[1], self.shape[1])
        return self._narrow(rows[:, 0])[:, None]  # type: ignore[no-any-return]


class _Keys:
    """Stands for the layer's cache: keeps keys and values of all positions, then gives them always."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def catch(self, layer: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> None:
        """Run the layer up to where it knows its keys: attention and all behind it are left out."""
        try:
            with _one_query(layer, states.shape[1]):  # which nobody reads
                layer.forward(states, **kwargs | {"past_key_values": self})
        except _Caught:
            return
        raise NotImplementedError("its last layer asks no cache for keys")

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            self.kept = keys, values
            raise _Caught
        return self.kept


class _Caught(Exception):
    """The keys are there."""


@contextmanager
def _one_query(layer: nn.Module, length: int) -> Iterator[None]:
    """Inside, a layer with a module for queries (R, T, d) makes one a row, and has it T = `length` times."""
    hooks = []
    for name, module in layer.named_modules():
        if name.endswith(".q_proj"):
            hooks.append(module.register_forward_pre_hook(lambda _, given: (given[0][:, :1],)))
            hooks.append(module.register_forward_hook(lambda _, __, made: made.repeat(1, length, 1)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
