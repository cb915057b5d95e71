"""Rollouts: replies sampled from the present policy, and what an update needs to know of them."""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from reward.batch import Example
from reward.functions import RunningScale, Scores
from reward.paths import chosen
from reward.sampler import Sample, Sampler
from reward.tokens import logprobs_and_values, values
from stages.ppo_config import PPOConfig
from stages.ppo_math import gae, importance_weights, missing_eos, token_rewards, whiten
from stages.ppo_models import Prompts, Reference
from stages.ppo_objective import Experience


class Rollout(BaseModel):
    """One sampled reply, for the record and the plots."""

    step: int
    """Update, from 1."""
    id: str
    completion: str
    reward: float
    """Weighted sum of the reward functions, before scaling, penalty and KL."""
    kl: float
    """log pi - log pi_ref summed over the reply, nats."""
    length: int
    stopped: bool
    gold: float | None = None


@dataclass(frozen=True)
class Replies:
    """What a policy answered, one entry for each reply."""

    rows: list[int]
    """Rows of the dataset that were answered."""
    samples: list[Sample]
    texts: list[str]
    """Replies without their stop token."""
    experience: list[Experience]
    """Token ids, log-probabilities and values; advantages and returns are empty until there is a score."""
    reference: list[list[float]]
    """Log-probability of each token under the reference."""

    @property
    def kl(self) -> list[float]:
        """Of each reply, log pi - log pi_ref summed over its tokens: nats."""
        pairs = zip(self.experience, self.reference, strict=True)
        return [sum(e.old_logps[: len(reference)]) - sum(reference) for e, reference in pairs]


class Clock:
    """Seconds spent in each phase since they were last taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"seconds/{phase}"] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, defaultdict(float)
        return dict(taken)


def peak_memory(device: torch.device) -> float:
    """MiB: of the process, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Actor:
    """The policy as it answers prompts."""

    def __init__(self, policy: Any, tokenizer: Any, reference: Reference, args: PPOConfig, clock: Clock):
        self.policy, self.tokenizer, self.reference, self.args, self.clock = (
            policy,
            tokenizer,
            reference,
            args,
            clock,
        )
        self.sampler = Sampler(policy, tokenizer, args.response_length, args.temperature)

    def answer(self, prompts: Prompts, rows: list[int], keys: list[str]) -> Replies:
        """One reply to each of the rows; the keys seed the draws."""
        with self.clock("sampling"):
            samples = self.sampler.sample([prompts.tokens[row] for row in rows], keys)
        examples = [Example(prompts.tokens[row], (s.tokens,)) for row, s in zip(rows, samples, strict=True)]
        with self.clock("reference"):
            reference, states = self.reference.measure(examples, self.args.temperature)
        with self.clock("values"):
            experience = self._measured(examples, samples)
        experience = [replace(e, states=entering) for e, entering in zip(experience, states, strict=True)]
        return Replies(rows, samples, [self.sampler.text(s) for s in samples], experience, reference)

    def _measured(self, examples: list[Example], samples: list[Sample]) -> list[Experience]:
        """Log-probabilities and values of every token: as sampled, where training would compute the same."""
        appends = self.args.score_slot == "post_eos"
        appended = [appends and len(s.tokens) < self.args.response_length for s in samples]
        if appends:
            pad = self.tokenizer.pad_token_id
            extended = zip(examples, appended, strict=True)
            examples = [Example(e.prompt, (e.completions[0] + [pad] * more,)) for e, more in extended]
        apart = hasattr(self.policy, "value_model")
        if self._half() or (appends and not apart):
            found = [row for (row,) in logprobs_and_values(self.policy, examples, self.args.temperature)]
        elif apart:
            of_states = [row for (row,) in values(chosen(self.policy.value_model, examples), examples)]
            each = zip(samples, appended, of_states, strict=True)
            found = [(s.logprobs + [0.0] * more, v) for s, more, v in each]  # no policy loss reads the last
        else:
            found = [(s.logprobs, s.values) for s in samples]
        return [
            Experience(e.prompt, e.completions, *of, [], [], self._weights(of[0], s, more), more)
            for e, of, s, more in zip(examples, found, samples, appended, strict=True)
        ]

    def _half(self) -> bool:
        """Below fp32, sampling token by token gives other numbers than training on whole rows."""
        weights = next(self.policy.parameters()).dtype
        return bool(self.args.bf16 or self.args.fp16 or weights != torch.float32)

    def _weights(self, logps: list[float], sample: Sample, appended: bool) -> list[float]:
        trained, sampled = torch.tensor(logps[: len(sample.tokens)]), torch.tensor(sample.logprobs)
        correction = importance_weights(trained, sampled, self.args.is_correction, self.args.is_threshold)
        return correction.tolist() + [0.0] * appended


def experience(
    replies: Replies, scores: Scores, finals: Sequence[float], args: PPOConfig, kl_coef: float
) -> list[Experience]:
    """Advantages and returns of scored replies.

    `finals` (R,) are the scores as the reward of the last token; rewards of single tokens are in `scores`.
    """
    logps, mask = padded([e.old_logps for e in replies.experience])
    of_states, _ = padded([e.old_values for e in replies.experience])
    reference, chosen = padded(replies.reference, mask.shape[1])
    rewards = token_rewards(torch.tensor(finals), (logps - reference) * chosen, mask, kl_coef, args.kl_clip)
    if scores.tokens is not None:
        rewards += padded(scores.tokens, mask.shape[1])[0]
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages = gae(rewards, of_states, mask, args.gamma, args.lam)
    returns = advantages + of_states
    advantages = whiten(advantages, chosen)  # over the whole rollout; the returns stay as they are
    return [
        replace(e, advantages=advantages[i, mask[i]].tolist(), returns=returns[i, mask[i]].tolist())
        for i, e in enumerate(replies.experience)
    ]


def scaled(scores: Scores, scale: RunningScale) -> Scores:
    """Scores whose totals have mean 0 and deviation 1: the mean is taken off each reply's last token."""
    tokens = scores.tokens and [[value / scale.std for value in row] for row in scores.tokens]
    return replace(scores, scalars=scale(scores.scalars), tokens=tokens)


def final_scores(replies: Replies, scores: Scores, args: PPOConfig) -> list[float]:
    """The scalar part of the scores after clipping and the rule for replies that did not stop."""
    clip = math.inf if args.reward_clip is None else args.reward_clip
    kept = [min(clip, max(-clip, score)) for score in scores.scalars]
    stopped = [sample.stopped for sample in replies.samples]
    return missing_eos(kept, stopped, args.missing_eos_penalty, args.missing_eos_mode)


def rollout_rows(replies: Replies, scores: Scores, ids: Sequence[str], step: int) -> list[Rollout]:
    return [
        Rollout(
            step=step,
            id=ids[row],
            completion=text,
            reward=score,
            kl=nats,
            length=len(sample.tokens),
            stopped=sample.stopped,
        )
        for row, sample, text, score, nats in zip(
            replies.rows, replies.samples, replies.texts, scores.totals, replies.kl, strict=True
        )
    ]


def summary(rows: Sequence[Rollout]) -> dict[str, float]:
    """Means over the replies of a rollout."""
    n = len(rows)
    return {
        "reward": sum(row.reward for row in rows) / n,
        "kl": sum(row.kl for row in rows) / n,
        "length": sum(row.length for row in rows) / n,
        "self_stopping": sum(row.stopped for row in rows) / n,
    }


def padded(rows: Sequence[Sequence[float]], width: int = 1) -> tuple[Tensor, Tensor]:
    """Lists of length <= C -> (R, C) values and their mask; C is `width` or more."""
    width = max(width, *map(len, rows))
    filled = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return filled, mask
