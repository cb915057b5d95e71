"""Conversations -> token ids -> batches -> numbers per token: the only place that renders, pads or gathers.

Every trainer, the sampler and the evaluator go through here, so that what is trained, sampled and scored is
the same sequence: the chat template up to the reply, the reply's own tokens, the stop token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from annotate.records import DataError, Message, prompt_id
from reward.batch import Batch, Example, chunks, micro_batches
from reward.head import HeadInput, head_logprobs
from reward.last_layer import reading
from reward.parallel import shared
from reward.passes import run, score_head, trunk
from reward.rotary import rotating

T = TypeVar("T")


@dataclass(frozen=True)
class Path:
    """Which shortcuts `reward.paths.choose` found to give the model's own numbers; none before it looked."""

    shares: bool = False
    """The completions of one prompt share a row."""
    head: bool = False
    """Logits are the head's product with the trunk's states, so `reward.head` makes their log-softmax."""
    padding_free: bool = False
    """Rows can lie one behind the other, without padding."""
    layers: str = ""
    """Name of the trunk's list of layers, whose last can work where it is read alone; empty if it cannot."""
    rotary: bool = False
    """Positions turn queries and keys as `reward.rotary` does."""
    why: tuple[str, ...] = ()
    """Of rows, padding, head, layers and positions, in this order."""
    length: int = 0
    """Tokens of the longest sequence they were tried on: a sliding window shows in longer ones alone."""


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
) -> list[Example]:
    """What the model reads of each conversation and its completions."""
    prompts = prompts_ids(tokenizer, [messages for messages, _ in rows])
    texts = list(dict.fromkeys(text for _, completions in rows for text in completions))
    known = dict(zip(texts, completions_ids(tokenizer, texts), strict=True))
    return [
        Example(prompt, tuple(known[text] for text in completions))
        for prompt, (_, completions) in zip(prompts, rows, strict=True)
    ]


def prompts_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Each as the chat template renders it, up to where the assistant begins to speak.

    One call for all, and for a conversation that comes again: alone, each costs more than its tokens.
    DataError where the template refuses one (some know no system message), with its id.
    """
    distinct = list(dict.fromkeys(map(tuple, conversations)))
    try:
        ids = rendered(tokenizer, distinct)
    except Exception:  # a template is a program of somebody else's and may raise anything
        for messages in distinct:
            try:
                rendered(tokenizer, [messages])
            except Exception as error:
                raise DataError(
                    f"prompt {prompt_id(messages)}: the chat template refuses it ({error}); "
                    "change its messages, or give the tokenizer another template"
                ) from None
        raise
    known = dict(zip(distinct, ids, strict=True))
    return [known[tuple(messages)] for messages in conversations]


def rendered(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """As `prompts_ids`, and what the template raises as it is."""
    chats = [[message.model_dump() for message in messages] for messages in conversations]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [ids for part in chunks(chats, AT_ONCE) for ids in tokenizer.apply_chat_template(part, **how)]


def completions_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each reply and the stop token, which is trained and scored like any other."""
    parts = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in chunks(list(texts), AT_ONCE))
    return [[*ids, tokenizer.eos_token_id] for part in parts for ids in part]


AT_ONCE = 4096
"""Texts: until a call ends, the tokenizer keeps much more of each than its ids."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """As `prompts_ids`, of one conversation."""
    return prompts_ids(tokenizer, [messages])[0]


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As `completions_ids`, of one reply."""
    return completions_ids(tokenizer, [text])[0]


def forward(model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the completion tokens, and state values where the model carries what gives them.

    Returns two (K, C) fp32 tensors, zero outside `batch.mask`; the second by the model's `value_head`, which
    reads the same states as its language-model head, or by a `value_model` of its own, and else None.
    Logits are made at the predicting positions only and divided by the temperature before the log-softmax,
    as in the distribution that was sampled from; by `reward.head` where the model's head is known to be a
    plain product (`reward.paths`).
    """
    value_head = getattr(model, "value_head", None)
    with precision_of(model):
        logps, states = _predicted(model, batch, temperature, with_states=value_head is not None)
    if (value_model := getattr(model, "value_model", None)) is not None:
        return batch.pad(logps), state_values(value_model, batch)
    values = None if value_head is None else batch.pad(value_head(states.float()).squeeze(-1))
    return batch.pad(logps), values


def _predicted(model: Any, batch: Batch, temperature: float, with_states: bool) -> tuple[Tensor, Tensor]:
    """(N,) fp32 log-probabilities of the completion tokens, and (N, d) the states that they are read from."""
    path: Path = getattr(model, "path", Path())
    if path.head:
        states = states_at(model, batch, batch.reads)
        head = model.get_output_embeddings()
        return head_logprobs(states, head.weight, batch.targets, temperature, head.bias), states
    with HeadInput(model, wanted=with_states) as hidden, read_at(model, batch.reads) as read:
        logits = run(model, batch, logits_to_keep=read).logits
    logits = logits.float()
    if temperature != 1.0:  # a division by 1 would still be a pass over the largest tensor there is
        logits = logits / temperature
    return -F.cross_entropy(logits, batch.targets, reduction="none"), hidden.states


def precision_of(model: Any) -> AbstractContextManager[Any]:
    """Around a pass: autocast to what its Trainer's `bf16` or `fp16` asks for (`stages.engine` notes it)."""
    dtype = getattr(model, "mixed_precision", None)
    return nullcontext() if dtype is None else torch.autocast(device_of(model).type, dtype)


def state_values(model: Any, batch: Batch) -> Tensor:
    """(K, C) fp32 values of the states before each completion token, by a sequence-classification model."""
    return batch.pad(_scores_at(model, batch, batch.reads))


def scores(model: Any, examples: Sequence[Example]) -> Tensor:
    """(K,) fp32 scalar rewards of a sequence-classification model, one for each completion.

    Where its config says `reward_reads: reply` (ours do) the reward is the head's mean over the states of the
    reply's tokens, the stop token included: each carries what is right or wrong at that place, which a small
    model cannot gather at the end. Else it is read at the last token, as elsewhere. Positions come from the
    segments; `transformers` would look for the last id that is not pad, the wrong token where pad = eos.
    """
    batch = batch_of(model, examples, scored=True)
    if getattr(model.config, "reward_reads", "last") == "reply":
        at_token = batch.pad(_scores_at(model, batch, batch.reads))
        return at_token.sum(1) / batch.mask.sum(1).clamp(min=1)
    lasts = (batch.mask & ~F.pad(batch.mask[:, 1:], (0, 1)))[batch.mask]
    ends = batch.reads.masked_scatter(batch.reads, lasts)
    found = _scores_at(model, batch, ends)
    return found.new_zeros(len(batch.mask)).masked_scatter(batch.mask.any(1), found)


def _scores_at(model: Any, batch: Batch, at: Tensor) -> Tensor:
    """(N,) fp32 of a sequence-classification model's head, where `at` (R, T) bool is true."""
    with precision_of(model):
        found: Tensor = score_head(model)(states_at(model, batch, at))
    return found.float().squeeze(-1)


def states_at(model: Any, batch: Batch, at: Tensor) -> Tensor:
    """(N, d) below the head, where `at` (R, T) bool is true."""
    with read_at(model, at) as read:
        states: Tensor = run(trunk(model), batch).last_hidden_state[read]
    return states


@contextmanager
def read_at(model: Any, at: Tensor) -> Iterator[Tensor]:
    """Around a pass that is read at `at` (R, T) alone; gives the mask that finds these in what it returns.

    Layers take the shortcuts that `model.path` has for them.
    """
    path: Path = getattr(model, "path", Path())
    inner = trunk(model)
    narrowed = reading(inner, path.layers, at) if path.layers else nullcontext(at)
    with rotating(inner) if path.rotary else nullcontext(), narrowed as read:
        yield read


def logprobs(
    model: nn.Module, examples: Sequence[Example], temperature: float = 1.0
) -> list[list[list[float]]]:
    """Per example and completion, the log-probability of each token (natural log); no gradient."""

    def rows(some: list[Example]) -> list[list[float]]:
        batch = batch_of(model, some)
        return _rows(forward(model, batch, temperature)[0], batch.mask)

    return _without_grad(model, examples, rows)


def logprobs_and_values(
    model: nn.Module, examples: Sequence[Example], temperature: float
) -> list[list[tuple[list[float], list[float]]]]:
    """As `logprobs`, with the value of the state before each token beside it."""

    def rows(some: list[Example]) -> list[tuple[list[float], list[float]]]:
        batch = batch_of(model, some)
        logps, values = forward(model, batch, temperature)
        assert values is not None, "the model has no value head"
        return list(zip(_rows(logps, batch.mask), _rows(values, batch.mask), strict=True))

    return _without_grad(model, examples, rows)


def values(model: nn.Module, examples: Sequence[Example]) -> list[list[list[float]]]:
    """Per example and completion, the value of the state before each token, by a model of its own."""

    def rows(some: list[Example]) -> list[list[float]]:
        batch = batch_of(model, some)
        return _rows(state_values(model, batch), batch.mask)

    return _without_grad(model, examples, rows)


def rewards(model: nn.Module, examples: Sequence[Example]) -> list[list[float]]:
    """Per example and completion, the reward model's score; no gradient."""
    return _without_grad(model, examples, lambda some: scores(model, some).tolist())


def token_budget(model: nn.Module) -> int:
    """Tokens of one forward pass, padding included. A GPU wants large ones.

    On a CPU what fits its caches is fastest; fewer of a wide model are as fast, and take less memory.
    """
    if device_of(model).type != "cpu":
        return 16384
    width: int = getattr(model.config.get_text_config(), "hidden_size", 256)  # type: ignore[operator, union-attr]
    return 448 if width > 256 else min(4096, 2**18 // width)


@torch.no_grad()
def _without_grad(
    model: nn.Module, examples: Sequence[Example], rows_of: Callable[[list[Example]], list[T]]
) -> list[list[T]]:
    results: list[list[T]] = [[] for _ in examples]
    training = model.training
    model.eval()
    groups = list(grouped(model, examples))
    found = shared(groups, lambda group: rows_of([examples[i] for i in group]))
    for group, of_group in zip(groups, found, strict=True):
        rows = iter(of_group)
        for i in group:
            results[i] = [next(rows) for _ in examples[i].completions]
    model.train(training)
    return results


def grouped(model: nn.Module, examples: Sequence[Any], max_tokens: int | None = None) -> Iterator[list[int]]:
    """Indices of the examples, micro-batch by micro-batch, under `max_tokens` or the model's own budget."""
    return micro_batches(examples, max_tokens or token_budget(model), *_in_rows(model))


def batch_of(model: nn.Module, examples: Sequence[Example], scored: bool = False) -> Batch:
    return Batch.of(examples, pad_id(model), device_of(model), *_in_rows(model), scored)


def _in_rows(model: nn.Module) -> tuple[bool, bool]:
    """May the completions of one prompt share a row, and rows lie one behind the other?

    Not before `reward.paths.choose` has tried it, nor where backward runs layers again, which knows no rows.
    """
    path: Path = getattr(model, "path", Path())
    again = getattr(trunk(model), "is_activation_checkpointing", False)
    return path.shares, path.padding_free and not again


def pad_id(model: nn.Module) -> int:
    """The id to fill batches with: any valid one would do, since masks are explicit."""
    return model.config.pad_token_id or 0  # type: ignore[union-attr, return-value]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _rows(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]
