"""Training the last layers of a language model alone, with the states that enter them computed once.

PPO passes over the same tokens for the reference, the old log-probabilities and values, and in every epoch:
what frozen layers give is kept from one pass, and the reference needs a copy of the trained layers only.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from annotate.records import DataError
from reward.batch import Batch, Example
from reward.last_layer import layers_of
from reward.passes import run, trunk
from reward.paths import attempt, difference
from reward.tokens import device_of


class Prefix:
    """The frozen lower layers of a causal LM, and a frozen copy of the layers above them as at the start.

    `train_layers` is `last:k`. What trains is what trained before among the top k layers and what the trunk
    calls behind them, its final norm; of a model with adapters, the adapters there; and any value head.
    Make it when the model is on its device, before weights of an interrupted training are loaded.
    Raises DataError unless 1 <= k < layers and the model allows it.
    """

    def __init__(self, model: Any, train_layers: str):
        self.model, self._trunk = model, trunk(model)
        path, layers = _layers(model)
        word, _, k = train_layers.partition(":")
        if word != "last" or not k.isdecimal() or not 1 <= int(k) < len(layers):
            raise DataError(f"train_layers: {train_layers!r}; give last:k with k from 1 to {len(layers) - 1}")
        self._k = int(k)
        parent, _, self._name = path.rpartition(".")
        self._owner = self._trunk.get_submodule(parent)
        norms = _behind(model, self._owner, layers[-1])
        top = nn.ModuleList([*layers[-self._k :], *norms.values()])
        trained = {id(p) for p in top.parameters()}
        if any(id(p) in trained for p in layers[: -self._k].parameters()):
            raise _cannot(model, "they share weights with others")
        for p in (*self._trunk.parameters(), *model.get_output_embeddings().parameters()):
            p.requires_grad_(p.requires_grad and id(p) in trained)
        copies = list(copy.deepcopy(top).requires_grad_(False).eval())
        self._copies, self._norms = copies[: self._k], dict(zip(norms, copies[self._k :], strict=True))

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(R, T, d) hidden states entering the first trained layer; neither it nor a layer above is run."""
        lower, top = self._split()
        stubs = [_HandOn(layer) for layer in top]
        with self._swapped([*lower, *stubs], {name: nn.Identity() for name in self._norms}):
            return self._last(batch)  # type: ignore[no-any-return]

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, the model's forward pass on a batch (R, T) starts from its states (R, T, d)."""
        lower, top = self._split()
        stubs = [_HandOn(layer, states) for layer in lower]
        with self._swapped([*stubs, *top], {}):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the copies stand for the trained layers and the final norm; goes together with `given`."""
        with self._swapped([*self._split()[0], *self._copies], self._norms):
            yield

    def check(self, batch: Batch) -> None:
        """Compare a pass from kept states with a plain one, once, on long rows; raises DataError."""

        def error() -> tuple[float, float]:
            plain = self._last(batch)
            with self.given(self.states(batch)):
                return difference(*(torch.cat(batch.split(of)) for of in (plain, self._last(batch))))

        exact, why = attempt(error)
        if not exact:
            raise _cannot(self.model, f"they need more than the states below, {why}")

    def _split(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The lower and the top layers as they stand now."""
        layers = list(getattr(self._owner, self._name))
        return layers[: -self._k], layers[-self._k :]

    def _last(self, batch: Batch) -> Any:
        return run(self._trunk, batch).last_hidden_state

    @contextmanager
    def _swapped(self, layers: list[nn.Module], others: dict[str, Any]) -> Iterator[None]:
        modules = {self._name: nn.ModuleList(layers)} | others
        kept = dict(self._owner._modules)
        try:
            self._owner._modules.update(modules)
            yield
        finally:
            self._owner._modules.update(kept)


class _HandOn(nn.Module):
    """Stands in a layer's place and returns `states`, or else what enters."""

    def __init__(self, layer: nn.Module, states: Tensor | None = None):
        super().__init__()
        self.__dict__.update(layer=layer, states=states)  # the layer not as a submodule: it takes no part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # whatever the trunk's loop reads of its layers

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        states = hidden_states if self.states is None else self.states
        if states.shape != hidden_states.shape:
            raise ValueError(f"states of {tuple(states.shape)}, batch of {tuple(hidden_states.shape)}")
        return states


def _layers(model: Any) -> tuple[str, Any]:
    found = layers_of(trunk(model))
    if found is None:
        raise _cannot(model, "found no list of its layers")
    return found


@torch.no_grad()
def _behind(model: Any, owner: nn.Module, last: nn.Module) -> dict[str, nn.Module]:
    """What the trunk calls behind its last layer, found by a pass: registration has another order."""
    called: list[str] = []
    hooks = [last.register_forward_hook(lambda *_: called.clear())]
    for name, child in owner.named_children():
        hooks.append(child.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
    run(trunk(model), Batch.of([Example([0, 0], ([0],))], 0, device_of(model)))
    for hook in hooks:
        hook.remove()
    return {name: owner.get_submodule(name) for name in called}


def _cannot(model: Any, why: str) -> DataError:
    name = type(trunk(model)).__name__
    return DataError(f"train_layers: {name} cannot train its last layers alone ({why}); leave it out")
