"""Training of the last layers alone: what the frozen layers below say is computed once and used again.

The lower layers are swapped for stubs that hand on the states computed before; masks, positions and the
scaling of embeddings happen outside of the layers, so this holds for the decoders of transformers at large.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from annotate.records import DataError
from reward.batch import Batch
from reward.tokens import inputs, trunk


class Prefix:
    """The frozen lower layers of a causal language model, and the last ones as they were at the start.

    `train_layers`: "last:k" leaves the last k layers and the norm behind them to be trained; embeddings, head
    and all layers below are frozen. DataError for a text or number that means nothing.
    """

    def __init__(self, model: Any, train_layers: str):
        self.model, self.layers = model, _layers(trunk(model))
        found = re.fullmatch(r"last:(\d+)", train_layers)
        count = int(found[1]) if found else 0
        if not 1 <= count < len(self.layers):
            raise DataError(
                f"train_layers: last:k with k from 1 to {len(self.layers) - 1} of the model's "
                f"{len(self.layers)} layers, not {train_layers!r}"
            )
        self.first = len(self.layers) - count
        model.requires_grad_(False)
        self.trained = {name: part for name, part in trunk(model).named_children() if _is_norm(name, part)}
        for part in [*self.layers[self.first :], *self.trained.values()]:
            part.requires_grad_(True)
        self.copies = copy.deepcopy(list(self.layers[self.first :])), copy.deepcopy(self.trained)
        for part in [*self.copies[0], *self.copies[1].values()]:
            part.requires_grad_(False)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(R, T, d) hidden states that enter the first trained layer."""
        found: list[Tensor] = []
        kept = self.layers[self.first]
        self.layers[self.first] = _Catch(kept, found)
        try:
            trunk(self.model)(**inputs(self.model, batch))
        except _Caught:
            pass
        finally:
            self.layers[self.first] = kept
        return found[0]

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, a forward on a batch of this shape starts from these states."""
        kept = list(self.layers[: self.first])
        for i, layer in enumerate(kept):
            self.layers[i] = _Given(layer, states if i == self.first - 1 else None)
        try:
            yield
        finally:
            for i, layer in enumerate(kept):
                self.layers[i] = layer

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the trained parts are as they were at the start."""
        kept = list(self.layers[self.first :])
        self._put(*self.copies)
        try:
            yield
        finally:
            self._put(kept, self.trained)

    def _put(self, layers: list[nn.Module], norms: dict[str, nn.Module]) -> None:
        for i, layer in enumerate(layers, self.first):
            self.layers[i] = layer
        for name, part in norms.items():
            setattr(trunk(self.model), name, part)


class _Stub(nn.Module):
    """In the place of a layer, for a model that asks the layer what kind it is."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: parameters keep their names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


class _Given(_Stub):
    def __init__(self, layer: nn.Module, states: Tensor | None):
        super().__init__(layer)
        self.__dict__["states"] = states

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        states = self.__dict__["states"]
        return hidden if states is None else states


class _Catch(_Stub):
    def __init__(self, layer: nn.Module, found: list[Tensor]):
        super().__init__(layer)
        self.__dict__["found"] = found

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.__dict__["found"].append(hidden)
        raise _Caught


class _Caught(Exception):
    """The states are known; the layers above need not run."""


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise DataError(f"train_layers: {type(model).__name__} has no list of layers")
    return max(lists, key=len)


def _is_norm(name: str, part: nn.Module) -> bool:
    """The norm behind the last layer, under the names that transformers gives it."""
    return isinstance(part, nn.Module) and ("norm" in name or name == "ln_f")
