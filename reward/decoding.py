"""Rows that grow by a token at a time and what a model keeps of them: a cache, an encoder's states."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from reward.passes import encoded, encodes, start_token
from reward.tokens import device_of, pad_id


def decoding(model: Any, prompts: Sequence[list[int]]) -> "Decoding":
    """Of prompts as token ids, a row for each."""
    return _EncoderDecoder(model, prompts) if encodes(model) else Decoding(model, prompts)


class Decoding:
    """R rows of a decoder; read again for each token if it returns no keys and values (a recurrent state)."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]):
        self.model, self.cache = model, None
        self.ids, self.mask = _padded(model, prompts, left=True)

    def step(self) -> Tensor:
        """(R, V) logits of the next token of each row."""
        output = self.model(**self._inputs(), past_key_values=self.cache, use_cache=True)
        if self.cache is None:
            given = getattr(output, "past_key_values", None)
            self.cache = None if given is None else _with_room(given)
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, one of them perhaps several times."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def append(self, tokens: Tensor) -> None:
        """(R, 1) the token that comes next in each row."""
        self.ids = tokens if self.cache is not None else torch.cat([self.ids, tokens], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def _inputs(self) -> dict[str, Any]:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "logits_to_keep": 1,
        }


class _EncoderDecoder(Decoding):
    """R rows of an encoder-decoder: prompts are read once, and replies grow from its start token."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]):
        self.model, self.cache = model, None
        read, self.mask = _padded(model, prompts, left=False)  # positions of an encoder count from the left
        self.states = encoded(model, read, self.mask)
        self.ids = torch.full((len(prompts), 1), start_token(model), device=read.device)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.states = self.states[rows]

    def append(self, tokens: Tensor) -> None:
        self.ids = tokens if self.cache is not None else torch.cat([self.ids, tokens], dim=1)

    def _inputs(self) -> dict[str, Any]:
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=self.states),
            "attention_mask": self.mask,
            "decoder_input_ids": self.ids,
        }


def _padded(model: Any, prompts: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """(R, T) ids and mask of prompts, with padding on one side."""
    width, pad, device = max(map(len, prompts)), pad_id(model), device_of(model)

    def rows(prompt: list[int], fill: int) -> list[int]:
        filling = [fill] * (width - len(prompt))
        return filling + prompt if left else prompt + filling

    ids = torch.tensor([rows(prompt, pad) for prompt in prompts], device=device)
    return ids, torch.tensor([rows([1] * len(prompt), 0) for prompt in prompts], device=device)


class RoomyLayer(DynamicLayer):
    """Keys and values in tensors with room for more; the library's own layer copies them all at each token.

    The results are the same bit for bit.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._rooms = (layer.keys, layer.values)
        self.keys, self.values = self._rooms

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        length = self.keys.shape[-2] + key_states.shape[-2]
        if self._rooms[0].shape[-2] < length:
            room = max(ROOM, key_states.shape[-2])
            self._rooms = (F.pad(self.keys, (0, 0, 0, room)), F.pad(self.values, (0, 0, 0, room)))
        self._rooms[0][..., self.keys.shape[-2] : length, :] = key_states
        self._rooms[1][..., self.keys.shape[-2] : length, :] = value_states
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = (self.keys, self.values)


ROOM = 32
"""Tokens."""


def _with_room(cache: Any) -> Any:
    """The cache a model has made, its plain layers replaced; sliding windows and states stay as they are."""
    for i, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = RoomyLayer(layer)
    return cache
