"""Which shortcuts give a model's own numbers: found out by trying them, once, on rows of the training itself.

Two completions of one prompt can share its row, rows can lie one behind the other without padding,
log-probabilities can be made from the states below the head, the last layer can work where it is read alone,
and positions can turn queries and keys in fewer passes. All hold for most decoders and fail for some (sliding
windows, ALiBi, a recurrent state, an encoder, a head that scales or caps its logits), in ways that a list of
architectures would never keep up with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from reward.batch import Batch, Example
from reward.last_layer import layers_of, reading
from reward.passes import run, trunk
from reward.rotary import rotating, turns
from reward.tokens import Path, device_of, pad_id

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed, in standard deviations of the states: rounding, where a wrong mask gives 1."""


def choose(model: Any, examples: Sequence[Example]) -> Path:
    """Try the shortcuts on three of the examples and set `model.path`; the path says why not, if not.

    The longest, since a sliding window shows only in rows that are longer than it, and the two shortest: one
    row alone could not be mixed up with another.
    """
    by_length = sorted(examples, key=lambda example: example.length)
    trial = _Trial(model, [by_length[i] for i in (0, min(1, len(by_length) - 1), -1)])
    several = any(len(example.completions) > 1 for example in trial.examples)
    training, wrapped = model.training, model.__dict__.pop("forward", None)
    model.eval()
    shares, why = attempt(trial.shared_error) if several else (False, "one completion a prompt")
    padding_free, why_padding = attempt(lambda: trial.padding_error(shares))
    head, why_not = attempt(trial.head_error)
    name, _ = layers_of(trunk(model)) or ("", None)
    alone, why_whole = attempt(lambda: trial.last_layer_error(shares, padding_free, name))
    rotary, why_turns = attempt(trial.rotary_error)
    tried = trial.examples[-1].length
    model.train(training)
    if wrapped is not None:  # a Trainer's, in mixed precision, which rounds more than the shortcuts differ
        model.forward = wrapped
    path = Path(
        shares,
        head,
        padding_free,
        name if alone else "",
        rotary,
        (why, why_padding, why_not, why_whole, why_turns),
        tried,
    )
    model.path = path
    return path


def chosen(model: Any, examples: Sequence[Example]) -> Any:
    """The model; its shortcuts are tried on these examples unless they have been on any as long."""
    longest = max((example.length for example in examples), default=0)
    if not hasattr(model, "path") or longest > model.path.length:
        choose(model, examples)
    return model


def describe(path: Path) -> str:
    of_rows, of_padding, _, of_layer, of_turns = path.why
    rows = "completions of a prompt share its row" if path.shares else "a row for each completion"
    padding = "without padding" if path.padding_free else "padded"
    layer = "where it is read alone" if path.layers else "everywhere"
    turned = "in fewer passes" if path.rotary else "as the model does"
    return (
        f"{rows} ({of_rows}), {padding} ({of_padding}); the last layer works {layer} ({of_layer}); "
        f"positions act {turned} ({of_turns})"
    )


def attempt(error: Any) -> tuple[bool, str]:
    """Is the shortcut exact? A model that refuses it altogether is as good a no as a difference."""
    try:
        with torch.no_grad():
            found, allowed = error()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as refused:
        return False, f"refused: {str(refused).splitlines()[0] if str(refused) else type(refused).__name__}"
    return found <= allowed, f"differs by {found:.1e}, allowed {allowed:.1e}"


@dataclass
class _Trial:
    """The examples with each shortcut, against the plain forward of each row alone.

    Each method returns (largest difference, what is allowed), as `difference` does.
    """

    model: Any
    examples: Sequence[Example]

    def shared_error(self) -> tuple[float, float]:
        """Are the states of completions that share their prompt's row those of a row for each?"""
        return difference(self._plain, self._states(self._batch(shared=True)))

    def padding_error(self, shared: bool) -> tuple[float, float]:
        """Are they the same where rows lie one behind the other?"""
        if (kind := trunk(self.model).config._attn_implementation) != "sdpa":
            raise TypeError(f"attention is {kind}, not sdpa")
        batch = self._batch(shared, padding_free=True)
        with torch.enable_grad():  # in training, attention of short rows is another
            states = self._states(batch).detach()
        return difference(self._plain, states)

    def head_error(self) -> tuple[float, float]:
        """Are the model's logits its head's product with the trunk's states, and nothing else?"""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise TypeError("the head is not a plain product")
        if getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            raise TypeError("logits are capped")  # which small ones of a new model would not show
        row = self._rows[-1]
        logits = run(self.model, row, logits_to_keep=row.segments > 1).logits
        return difference(logits, head(self._plain[-len(logits) :]))

    def last_layer_error(self, shared: bool, padding_free: bool, name: str) -> tuple[float, float]:
        """Are they those of the whole layer, where the first tokens of the completions alone are read?"""
        if not name:
            raise TypeError("found no list of its layers")
        batch = self._batch(shared, padding_free)
        firsts = batch.reads & ~batch.reads.roll(1, dims=1)
        with reading(trunk(self.model), name, firsts) as read:
            states = run(trunk(self.model), batch).last_hidden_state[read]
        return difference(self._plain[firsts[batch.segments > 1]], states)

    def rotary_error(self) -> tuple[float, float]:
        """Are they the same where positions turn queries and keys in fewer passes?"""
        if not turns(trunk(self.model)) or device_of(self.model).type != "cpu":
            raise TypeError("not by the usual function on a CPU")
        if getattr(trunk(self.model), "is_activation_checkpointing", False):
            raise TypeError("backward runs layers again")
        with rotating(trunk(self.model)):
            return difference(self._plain, torch.cat([self._states(row) for row in self._rows]))

    @cached_property
    def _plain(self) -> Tensor:
        """(N, d), below the head at each completion token and the one before the first."""
        return torch.cat([self._states(row) for row in self._rows])

    @cached_property
    def _rows(self) -> list[Batch]:
        alone = [Example(e.prompt, (completion,)) for e in self.examples for completion in e.completions]
        return [Batch.of([row], pad_id(self.model), device_of(self.model)) for row in alone]

    def _batch(self, shared: bool, padding_free: bool = False) -> Batch:
        return Batch.of(self.examples, pad_id(self.model), device_of(self.model), shared, padding_free)

    def _states(self, batch: Batch) -> Tensor:
        states: Tensor = run(trunk(self.model), batch).last_hidden_state[batch.segments > 1]
        return states


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(largest absolute difference in standard deviations, what is allowed)."""
    scale = float(a.float().std()) or 1.0
    return float((a - b).abs().max()) / scale, TOLERANCE[a.dtype]
