"""One pass of a model, or of its trunk, over a batch: causal rows, shared ones, without padding, and those of
encoder-decoders."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from annotate.records import DataError
from reward.batch import Batch
from reward.padding_free import attending


def run(module: Any, batch: Batch, logits_to_keep: Tensor | None = None) -> Any:
    """What a model, or its trunk, makes of a batch, with logits where the mask (R, T) is true alone.

    NotImplementedError for rows that an encoder-decoder cannot have.
    """
    if encodes(module):
        return _encode_decode(module, batch, logits_to_keep)
    options: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if logits_to_keep is not None:
        options["logits_to_keep"] = logits_to_keep
    if batch.layout is not None:
        with attending(module.config):
            return module(**options, position_ids=batch.position_ids, layout=batch.layout)
    if not batch.shared:
        return module(**options, attention_mask=batch.attention_mask())
    eager = module.config._attn_implementation == "eager"
    mask = batch.attention_mask(next(module.parameters()).dtype if eager else None)
    return module(**options, attention_mask=mask, position_ids=batch.position_ids)


def trunk(model: Any) -> Any:
    """The model without its head. Adapters sit inside its layers, so they act."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def score_head(model: Any) -> Any:
    """Of a sequence-classification model, what makes its score of a state; names differ by family."""
    return model.score if hasattr(model, "score") else model.classification_head


def encodes(model: Any) -> bool:
    """Is it an encoder-decoder, whose encoder reads the prompt and whose decoder writes the completion?"""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def encoded(model: Any, prompts: Tensor, mask: Tensor) -> Tensor:
    """(R, P, d) what the encoder makes of prompts (R, P)."""
    states: Tensor = trunk(model).get_encoder()(input_ids=prompts, attention_mask=mask).last_hidden_state
    return states


def start_token(model: Any) -> int:
    """What an encoder-decoder's completion begins with, which is no part of it; DataError if nothing says."""
    configs = (model.config, getattr(model, "generation_config", None), model.config.get_text_config())
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if (token := getattr(config, name, None)) is not None:
                return int(token)
    raise DataError(
        f"{type(model).__name__}: no token for its decoder to start with; set decoder_start_token_id"
    )


def _encode_decode(module: Any, batch: Batch, logits_to_keep: Tensor | None) -> Any:
    """As `run`: what the decoder says of a token is put where a causal model says it, one token before.

    That is at a row's last token of the prompt, in whose place the decoder is given its start token, and at
    those of the completion.
    """
    if batch.shared or batch.layout is not None:
        raise NotImplementedError("an encoder reads each prompt by itself")
    of_decoder = batch.segments > 1
    prompts, lengths = (batch.segments == 1).sum(1, keepdim=True) + 1, of_decoder.sum(1, keepdim=True)
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    read, written = columns[: int(prompts.max())] < prompts, columns[: int(lengths.max())] < lengths
    at = (prompts - 1 + columns[: written.shape[1]]).clamp(max=len(columns) - 1)
    prompt, reply = batch.input_ids[:, : read.shape[1]], batch.input_ids.gather(1, at)
    reply[:, 0] = start_token(module)
    if logits_to_keep is not None:
        with _head_at(module, logits_to_keep.gather(1, at) & written):
            return module(
                input_ids=prompt,
                attention_mask=read.long(),
                decoder_input_ids=reply,
                decoder_attention_mask=written.long(),
                use_cache=False,
            )
    decoder = trunk(module).get_decoder()
    states = decoder(
        input_ids=reply,
        attention_mask=written.long(),
        encoder_hidden_states=encoded(module, prompt, read.long()),
        encoder_attention_mask=read.long(),
        use_cache=False,
    ).last_hidden_state
    rows = states.new_zeros(*batch.input_ids.shape, states.shape[-1])
    return BaseModelOutput(last_hidden_state=rows.masked_scatter(of_decoder[..., None], states[written]))


def _head_at(model: Any, keep: Tensor) -> Any:
    """Inside, the head makes logits (N, V) where the mask (R, D) is true alone."""
    head = model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _, inputs: inputs[0][keep])
