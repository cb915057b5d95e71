"""Sampling: one loop over the unmodified Hugging Face model, for `sample`, PPO, evaluation and best-of-n.

Every prompt draws from a generator of its own, seeded by its key, and a token is chosen by inverting the
cumulative distribution at one uniform number: which rows share a batch never changes a draw.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from annotate.records import DataError
from reward.decoding import decoding
from reward.head import HeadInput
from reward.parallel import place, shared
from reward.tokens import device_of, token_budget


@dataclass(frozen=True)
class Sample:
    """One reply as sampled."""

    tokens: list[int]
    """Token ids, the stop token included when there was one."""
    logprobs: list[float]
    """Natural log-probability of each token in the distribution it was drawn from."""
    stopped: bool
    """Ended by its own stop token, not by the limit."""
    values: list[float]
    """Value of the state before each token; empty for a model without value head."""


class Bar(Protocol):
    def advance(self, steps: float = 1, /, **shown: float) -> None: ...


class Sampler:
    """Samples replies of at most `max_new_tokens` tokens at `temperature`, with neither top-k nor top-p."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float = 1.0,
        batch_size: int | None = None,
    ):
        """`batch_size` replies at once. None: 256; on a CPU more, if the model is narrow."""
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        if batch_size is None:  # a step of a narrow model costs a CPU little more for twice the replies
            batch_size = max(256, token_budget(model) // 4) if device_of(model).type == "cpu" else 256
        self.batch_size = batch_size
        self.stop = int(tokenizer.eos_token_id)
        self.limit = getattr(model.config, "max_position_embeddings", None)

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[str], bar: Bar | None = None
    ) -> list[Sample]:
        """One reply to each prompt (token ids); `keys` seed the draws, one for each prompt.

        Raises DataError for a prompt that leaves no room for a reply, naming it by its key.
        """
        self._check(prompts, keys)
        samples: list[Sample | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        training = self.model.training
        self.model.eval()
        size = min(self.batch_size, math.ceil(len(order) / place()[1]) or 1)
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def answer(rows: list[int]) -> list[Sample]:
            found = self._batch([prompts[i] for i in rows], [keys[i] for i in rows])
            if bar:
                bar.advance(len(rows) * place()[1])
            return found

        for rows, found in zip(batches, shared(batches, answer), strict=True):
            for i, sample in zip(rows, found, strict=True):
                samples[i] = sample
        self.model.train(training)
        return [sample for sample in samples if sample is not None]

    def text(self, sample: Sample) -> str:
        """The reply without its stop token, byte for byte as the model wrote it."""
        tokens = sample.tokens[:-1] if sample.stopped else sample.tokens
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], keys: list[str]) -> list[Sample]:
        uniforms = torch.stack([_uniforms(key, self.max_new_tokens) for key in keys])
        samples = [Sample([], [], False, []) for _ in prompts]
        stopped = [False] * len(prompts)
        alive = list(range(len(prompts)))  # which prompt each row of the cache belongs to
        value_head = getattr(self.model, "value_head", None)
        with HeadInput(self.model, wanted=value_head is not None) as hidden:
            for step, (logits, of) in enumerate(self._decode(prompts, samples, stopped, alive)):
                chosen, logps = draw(
                    logits[of].float() / self.temperature, uniforms[alive, step].to(logits.device)
                )
                states = hidden.states[:, -1][of].float() if value_head else None
                values = value_head(states).squeeze(-1).tolist() if value_head else None
                for i, (token, logp) in enumerate(zip(chosen.tolist(), logps.tolist(), strict=True)):
                    row = alive[i]
                    if not stopped[row]:
                        if math.isnan(logp):
                            raise DataError(f"prompt {keys[row]}: the model's logits are not finite numbers")
                        samples[row].tokens.append(token)
                        samples[row].logprobs.append(logp)
                        if values:
                            samples[row].values.append(values[i])
                        stopped[row] = token == self.stop
        return [replace(sample, stopped=ended) for sample, ended in zip(samples, stopped, strict=True)]

    def _decode(
        self, prompts: list[list[int]], samples: list[Sample], stopped: list[bool], alive: list[int]
    ) -> Iterator[tuple[Tensor, Any]]:
        """Logits (R, V) of the next token, step after step, and the row of each prompt that is still alive.

        A prompt that comes several times is read once; finished rows leave the cache. The caller appends to
        the samples and sets `stopped` between steps; `alive` is kept up to date here.
        """
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows = decoding(self.model, list(map(list, distinct)))
        row_of = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=rows.mask.device)
        for step in range(self.max_new_tokens):
            of: Any = slice(None)
            logits = rows.step()
            if step == 0 and len(distinct) < len(prompts):
                of = row_of
                rows.keep(row_of)
            yield logits, of
            if all(stopped):
                return
            # A copy of the cache costs about as much as a step: worth it once a fifth of the rows are done.
            if sum(stopped[row] for row in alive) > len(alive) / 5:
                rows.keep(
                    torch.tensor([i for i, row in enumerate(alive) if not stopped[row]]).to(row_of.device)
                )
                alive[:] = [row for row in alive if not stopped[row]]
            rows.append(torch.tensor([[samples[row].tokens[-1]] for row in alive], device=row_of.device))

    def _check(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> None:
        for prompt, key in zip(prompts, keys, strict=True):
            if self.limit is not None and len(prompt) + self.max_new_tokens > self.limit:
                raise DataError(
                    f"prompt {key}: {len(prompt)} tokens and {self.max_new_tokens} for the reply exceed "
                    f"the {self.limit} positions of the model; shorten it, lower max_new_tokens or drop it"
                )


def _uniforms(key: str, count: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: (B, V) fp32 logits and (B,) uniforms -> (B,) token ids, (B,) log-probabilities.

    In two steps, first a block of the vocabulary, then a token in it: the running sum over a whole row, in
    float64 since a float32 sum misses 1 by more than a rare token weighs, would cost more than the model.
    Of logits that are not finite any token, with a log-probability that is not a number.
    """
    top = logits.amax(1, keepdim=True)
    weights = (logits - top).exp_()
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)
    of_blocks = blocks.sum(2).double().cumsum(1)
    total = of_blocks[:, -1]
    block, left = _find(of_blocks, uniform * total)
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double().cumsum(1)
    chosen = (block * BLOCK + _find(inside, left)[0]).clamp(max=logits.shape[1] - 1)
    logps = logits.gather(1, chosen[:, None]).squeeze(1) - top.squeeze(1) - total.log().float()
    return chosen, logps


BLOCK = 128
"""Tokens of a block, near the square root of a large vocabulary."""


def _find(cdf: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) first entry of each row (B, n) of running sums above `at`, and what `at` leaves within it.

    Rounding may put `at` on the end of its row: it is moved just inside, to the last entry with any weight.
    """
    at = torch.minimum(at, cdf[:, -1] * (1 - 1e-12))
    found = torch.searchsorted(cdf, at[:, None], right=True).clamp(max=cdf.shape[1] - 1)  # where all is NaN
    before = F.pad(cdf, (1, 0)).gather(1, found)
    return found.squeeze(1), at - before.squeeze(1)
