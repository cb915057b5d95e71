"""Loading and saving policies and reward models; what a checkpoint lacks is added here and recorded."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from annotate.records import DataError
from reward.passes import encodes, score_head, start_token

PAD = "<|pad|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message.role }}:
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}

{% endfor -%}
{%- if add_generation_prompt %}assistant:
{% endif -%}"""
"""For checkpoints that bring none. Roles are plain words: no embedding has to be added and trained."""


class CheckpointError(DataError):
    """A checkpoint that cannot be used. One line: which, why, what to do."""


def longest_row(model: Any, asked: int | None = None) -> int:
    """Tokens of prompt and completion together: what is asked for, and no more than the model's positions.

    A model without positions of its own (ALiBi, a recurrent state) sets no limit: 10**9.
    """
    return min(asked or 10**9, getattr(model.config, "max_position_embeddings", 10**9))


def load_tokenizer(path: str | Path) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with a stop token, a pad token of its own and a chat template; and what had to be added.

    pad = eos is never allowed: code that finds lengths by comparing ids would then hide the stop token, and
    the model would never learn to stop.
    """
    tokenizer = _load(AutoTokenizer, path)
    if not tokenizer("a")["input_ids"]:  # of some families transformers makes one out of no files at all
        raise CheckpointError(f"{path}: the tokenizer has no vocabulary; save it beside the model")
    notes = []
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _stop_token(path, tokenizer)
        notes.append(f"stop token {tokenizer.eos_token!r} taken from the model's config")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
        notes.append(f"pad token {PAD!r} added")
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + CHAT_TEMPLATE
        notes.append("chat template added")
    tokenizer.padding_side = "right"
    return tokenizer, notes


def load_policy(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """(language model in fp32 on the best device, tokenizer); `path` is a local folder or a hub id."""
    tokenizer, _ = load_tokenizer(path)
    kind = AutoModelForSeq2SeqLM if _encodes(path) else AutoModelForCausalLM
    return _fit(_load(kind, path, dtype=torch.float32), tokenizer, path), tokenizer


def check_decoder(model: Any, path: str | Path) -> None:
    """CheckpointError for an encoder-decoder, which the trainers of TRL do not take."""
    if encodes(model):
        raise CheckpointError(
            f"{path}: an encoder-decoder, which TRL's trainers do not take; sft, rm, dpo and ppo do"
        )


def new_reward_model(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A reward model on the policy's trunk, with a fresh scalar head.

    The head starts at N(0, 1/(d+1)): scores of unit scale on a normalised hidden state of width d
    (Stiennon et al. 2020, appendix B.1; Huang et al. 2024, detail 24).
    """
    tokenizer, _ = load_tokenizer(path)
    model = _load(AutoModelForSequenceClassification, path, num_labels=1, dtype=torch.float32)
    model.config.reward_reads = "reply"  # see reward.tokens.scores
    last = [layer for layer in score_head(model).modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.normal_(last.weight, std=1 / math.sqrt(last.in_features + 1))
    return _fit(model, tokenizer, path), tokenizer


def load_reward(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """(sequence-classification model, its tokenizer, which may be given where none lies beside it)."""
    architectures = _load(AutoConfig, path).architectures or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise CheckpointError(
            f"{path} is a {architectures[0]}, not a reward model: give the model of an rm run"
        )
    tokenizer = tokenizer or load_tokenizer(path)[0]
    return _fit(
        _load(AutoModelForSequenceClassification, path, dtype=torch.float32), tokenizer, path
    ), tokenizer


def save(model: Any, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """A folder that `from_pretrained` reads; the same weights give the same bytes."""
    model.config.use_cache = True
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    return bool(a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template)


def without_gradient(model: Any) -> Any:
    """A frozen copy: the reference of DPO and PPO, handed on explicitly."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout rate to zero, also those that modules keep as numbers and apply functionally."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _load(cls: Any, path: str | Path, **options: Any) -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a fresh head is what is wanted; the report about it is noise
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: cannot be loaded as {cls.__name__} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)


def _encodes(path: str | Path) -> bool:
    """Is it an encoder-decoder, of which the causal class might take the decoder alone?

    Not where there is no config to tell: adapters name their model elsewhere.
    """
    try:
        return bool(_load(AutoConfig, path).is_encoder_decoder)
    except CheckpointError:
        return False


def _fit(model: Any, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Any:
    """Make the embedding as large as the vocabulary, tell the model its special tokens, and move it."""
    rows = model.get_input_embeddings().weight.shape[0]
    added = sum(tokenizer.get_vocab()[t] >= rows for t in (tokenizer.pad_token, tokenizer.eos_token) if t)
    if len(tokenizer) > rows + added:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings; "
            "they are not of the same checkpoint"
        )
    if len(tokenizer) > rows:
        _grow(model, rows, len(tokenizer))
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.bos_token_id = tokenizer.bos_token_id
    if encodes(model):
        model.config.decoder_start_token_id = start_token(model)  # a reward model of it starts with the same
    disable_dropout(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _grow(model: Any, rows: int, wanted: int) -> None:
    """Add embeddings that start as the mean of the others: the same at every load, unlike random ones."""
    model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = layer.weight[:rows].mean(0)


def _stop_token(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = _load(AutoConfig, path).eos_token_id
    token = ids[0] if isinstance(ids, list) else ids
    if token is None:
        raise CheckpointError(f"{path}: neither tokenizer nor config name a stop token; set eos_token_id")
    return str(tokenizer.convert_ids_to_tokens(token))
