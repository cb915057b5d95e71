"""Conversations -> token ids -> batches -> numbers per token: the only place that renders, pads or gathers.

Every trainer, the sampler and the evaluator go through here, so that what is trained, sampled and scored is
the same sequence: the chat template up to the reply, the reply's own tokens, the stop token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from annotate.records import Message

T = TypeVar("T")

MAX_TOKENS = 8192
"""Padded tokens of one forward pass; smaller passes cost calls, larger ones memory."""


@dataclass(frozen=True)
class Example:
    """A prompt and its completions (1 for SFT, 2 for a pair, k for a ranking), as token ids."""

    prompt: list[int]
    completions: tuple[list[int], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt) + max(map(len, self.completions))


@dataclass(frozen=True)
class Batch:
    """R rows (every completion of every example, in order) right-padded to T; completions padded to C."""

    input_ids: Tensor
    """(R, T) long."""
    attention_mask: Tensor
    """(R, T) long, 1 at tokens. Never inferred from ids, so pad = eos would be legal."""
    predicts: Tensor
    """(R, T) bool, True where the next token belongs to the completion."""
    targets: Tensor
    """(N,) long, all completion tokens, row by row."""
    mask: Tensor
    """(R, C) bool, True at completion tokens."""

    @classmethod
    def of(cls, examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> "Batch":
        rows = [(example.prompt, completion) for example in examples for completion in example.completions]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.full((len(rows), width), pad)
        attention = torch.zeros(len(rows), width, dtype=torch.long)
        predicts = torch.zeros(len(rows), width, dtype=torch.bool)
        mask = torch.zeros(len(rows), max(1, *(len(c) for _, c in rows)), dtype=torch.bool)
        for r, (prompt, completion) in enumerate(rows):
            p, n = len(prompt), len(prompt) + len(completion)
            ids[r, :n] = torch.tensor(prompt + completion)
            attention[r, :n] = 1
            predicts[r, p - 1 : n - 1] = True
            mask[r, : n - p] = True
        targets = torch.tensor([token for _, completion in rows for token in completion], dtype=torch.long)
        return cls(*(t.to(device) for t in (ids, attention, predicts, targets, mask)))

    def pad(self, flat: Tensor) -> Tensor:
        """(N,) values of the completion tokens -> (R, C), zero elsewhere."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
            self.mask, flat
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The conversation so far, rendered by the chat template up to where the assistant begins to speak."""
    ids: list[int] = tokenizer.apply_chat_template(
        [m.model_dump() for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The reply's tokens and the stop token, which is trained and scored like any other."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def forward(model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the completion tokens and, where the model carries a `value_head`, state values.

    Returns two (R, C) fp32 tensors, zero outside `batch.mask`; the second is None without a value head.
    Logits are made at the predicting positions only (the model's own head: scales and soft caps apply) and
    divided by the temperature before the log-softmax, as in the distribution that was sampled from.
    """
    with _HeadInput(model) as hidden:
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=batch.predicts,
            use_cache=False,
        ).logits
    logits = logits.float()
    if temperature != 1.0:  # a division by 1 would still be a pass over the largest tensor there is
        logits = logits / temperature
    logps = -F.cross_entropy(logits, batch.targets, reduction="none")
    head = getattr(model, "value_head", None)
    values = None if head is None else batch.pad(head(hidden.states.float()).squeeze(-1))
    return batch.pad(logps), values


def scores(model: Any, batch: Batch) -> Tensor:
    """(R,) fp32 scalar rewards of a sequence-classification model.

    Where its config says `reward_reads: reply` (ours do) the reward is the head's mean over the states of the
    reply's tokens, the stop token included: each carries what is right or wrong at that place, which a small
    model cannot gather at the end. Else it is read at the last token, as elsewhere. Positions come from the
    masks; `transformers` would look for the last id that is not pad, the wrong token where pad = eos.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    at_token = model.score(hidden).float().squeeze(-1)
    if getattr(model.config, "reward_reads", "last") == "reply":
        reads = batch.predicts.roll(1, dims=1)
    else:
        reads = torch.zeros_like(batch.predicts)
        reads.scatter_(1, batch.attention_mask.sum(1, keepdim=True) - 1, True)
    total: Tensor = (at_token * reads).sum(1)
    return total / reads.sum(1).clamp(min=1)


def logprobs(
    model: nn.Module, examples: Sequence[Example], temperature: float = 1.0
) -> list[list[list[float]]]:
    """Per example and completion, the log-probability of each token (natural log); no gradient."""
    return _without_grad(
        model, examples, lambda batch: _rows(forward(model, batch, temperature)[0], batch.mask)
    )


def logprobs_and_values(
    model: nn.Module, examples: Sequence[Example], temperature: float
) -> list[list[tuple[list[float], list[float]]]]:
    """As `logprobs`, with the value of the state before each token beside it."""

    def rows(batch: Batch) -> list[tuple[list[float], list[float]]]:
        logps, values = forward(model, batch, temperature)
        assert values is not None, "the model has no value head"
        return list(zip(_rows(logps, batch.mask), _rows(values, batch.mask), strict=True))

    return _without_grad(model, examples, rows)


def rewards(model: nn.Module, examples: Sequence[Example]) -> list[list[float]]:
    """Per example and completion, the reward model's score; no gradient."""
    return _without_grad(model, examples, lambda batch: scores(model, batch).tolist())


def micro_batches(examples: Sequence[Any], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Indices in groups of similar length whose padded size stays under `max_tokens` (one example at least).

    `examples` have `length` and `completions`. Sorting by length is what saves padding; the order of the
    groups does not matter to a loss that is normalised over the whole step.
    """
    group: list[int] = []
    rows = 0
    for index in sorted(range(len(examples)), key=lambda i: (examples[i].length, i)):
        k = len(examples[index].completions)
        if group and (rows + k) * examples[index].length > max_tokens:
            yield group
            group, rows = [], 0
        group.append(index)
        rows += k
    if group:
        yield group


@torch.no_grad()
def _without_grad(
    model: nn.Module, examples: Sequence[Example], rows_of: Callable[[Batch], list[T]]
) -> list[list[T]]:
    results: list[list[T]] = [[] for _ in examples]
    training = model.training
    model.eval()
    for group in micro_batches(examples):
        batch = batch_of(model, [examples[i] for i in group])
        rows = iter(rows_of(batch))
        for i in group:
            results[i] = [next(rows) for _ in examples[i].completions]
    model.train(training)
    return results


def batch_of(model: nn.Module, examples: Sequence[Example]) -> Batch:
    return Batch.of(examples, pad_id(model), device_of(model))


def pad_id(model: nn.Module) -> int:
    """The id to fill batches with: any valid one would do, since masks are explicit."""
    return model.config.pad_token_id or 0  # type: ignore[union-attr, return-value]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _rows(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]


class _HeadInput:
    """Catches what the language-model head is given, which is what a value head on the same trunk reads."""

    def __init__(self, model: nn.Module):
        self.wanted = hasattr(model, "value_head")
        self.model = model
        self.states = torch.empty(0)

    def __enter__(self) -> "_HeadInput":
        if self.wanted:
            head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
            self.hook = head.register_forward_pre_hook(lambda _, inputs: self._keep(inputs[0]))
        return self

    def _keep(self, states: Tensor) -> None:
        self.states = states

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            self.hook.remove()
