"""Which shortcuts give a model's own numbers: found out by trying them, once, on rows of the training itself.

Two completions of one prompt can share its row, rows can lie one behind the other without padding,
log-probabilities can be made from the states below the head, and the last layer can work where it is read
alone. All hold for most decoders and fail for some (a sliding window, ALiBi, a recurrent state, an encoder, a
head that scales or caps its logits), in ways that a list of architectures would never keep up with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reward.batch import Batch, Example
from reward.last_layer import layers_of, reading
from reward.tokens import Path, device_of, pad_id, run, trunk

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed, in standard deviations of the states: rounding, where a wrong mask gives 1."""


def choose(model: Any, examples: Sequence[Example]) -> Path:
    """Try the shortcuts on the longest of the examples and set `model.path`; the path says why not, if not.

    The longest, since a sliding window shows only in rows that are longer than it.
    """
    tried = sorted(examples, key=lambda example: example.length)[-2:]
    several = any(len(example.completions) > 1 for example in tried)
    training, wrapped = model.training, model.__dict__.pop("forward", None)
    model.eval()
    shares, why = False, "one completion a prompt"
    if several:
        shares, why = attempt(lambda: _shared_error(model, tried))
    padding_free, why_padding = attempt(lambda: _padding_error(model, tried, shares))
    head, why_not = attempt(lambda: _head_error(model, tried))
    name, _ = layers_of(trunk(model)) or ("", None)
    alone, why_whole = attempt(lambda: _last_layer_error(model, tried, shares, padding_free, name))
    model.train(training)
    if wrapped is not None:  # a Trainer's, in mixed precision, which rounds more than the shortcuts differ
        model.forward = wrapped
    path = Path(shares, head, padding_free, name if alone else "", (why, why_padding, why_not, why_whole))
    model.path = path
    return path


def chosen(model: Any, examples: Sequence[Example]) -> Any:
    """The model; its shortcuts are tried on these examples if they have not been on any."""
    if not hasattr(model, "path"):
        choose(model, examples)
    return model


def describe(path: Path) -> str:
    of_rows, of_padding, _, of_layer = path.why
    rows = "completions of a prompt share its row" if path.shares else "a row for each completion"
    padding = "without padding" if path.padding_free else "padded"
    layer = "where it is read alone" if path.layers else "everywhere"
    return f"{rows} ({of_rows}), {padding} ({of_padding}); the last layer works {layer} ({of_layer})"


def attempt(error: Any) -> tuple[bool, str]:
    """Is the shortcut exact? A model that refuses it altogether is as good a no as a difference."""
    try:
        with torch.no_grad():
            found, allowed = error()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as refused:
        return False, f"refused: {str(refused).splitlines()[0] if str(refused) else type(refused).__name__}"
    return found <= allowed, f"differs by {found:.1e}, allowed {allowed:.1e}"


def _shared_error(model: Any, examples: Sequence[Example]) -> tuple[float, float]:
    plain, shared = (
        Batch.of(examples, pad_id(model), device_of(model), shared=shared) for shared in (False, True)
    )
    return difference(*(_states(model, batch) for batch in (plain, shared)))


def _padding_error(model: Any, examples: Sequence[Example], shared: bool) -> tuple[float, float]:
    """Three rows, or more: one alone could not be mixed up with another."""
    if (kind := trunk(model).config._attn_implementation) != "sdpa":
        raise TypeError(f"attention is {kind}, not sdpa")
    of = (*examples, examples[-1], examples[0]), pad_id(model), device_of(model), shared
    return difference(*(_states(model, Batch.of(*of, padding_free=free)) for free in (False, True)))


def _head_error(model: Any, examples: Sequence[Example]) -> tuple[float, float]:
    """Are the model's logits its head's product with the trunk's states, and nothing else?"""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError("the head is not a plain product")
    batch = Batch.of(examples[-1:], pad_id(model), device_of(model))
    logits = run(model, batch, logits_to_keep=batch.predicts).logits
    hidden = run(trunk(model), batch).last_hidden_state[batch.predicts]
    return difference(logits, head(hidden))


def _last_layer_error(
    model: Any, examples: Sequence[Example], shared: bool, padding_free: bool, name: str
) -> tuple[float, float]:
    """Are the states those of the whole layer, where the first tokens of the completions alone are read?"""
    batch = Batch.of(examples, pad_id(model), device_of(model), shared, padding_free)
    firsts = batch.predicts & ~batch.predicts.roll(1, dims=1)
    if not name:
        raise TypeError("found no list of its layers")
    whole = run(trunk(model), batch).last_hidden_state[firsts]
    with reading(trunk(model), name, firsts) as read:
        return difference(whole, run(trunk(model), batch).last_hidden_state[read])


def _states(model: Any, batch: Batch) -> Tensor:
    """(N, d), below the head at each completion token."""
    states: Tensor = run(trunk(model), batch).last_hidden_state[batch.predicts.roll(1, dims=1)]
    return states


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(largest absolute difference in standard deviations, what is allowed)."""
    scale = float(a.float().std()) or 1.0
    return float((a - b).abs().max()) / scale, TOLERANCE[a.dtype]
