"""PPO for language models: rollouts, advantages and the clipped objective, on the engine.

Follows Schulman et al. 2017 (PPO), Ziegler et al. 2019 and Stiennon et al. 2020 (language models), with the
details collected by Huang et al. 2024 ("The N+ Implementation Details of RLHF with PPO").

One update = one rollout of `rollout_size` replies, then `num_ppo_epochs` passes over it in `num_mini_batches`
optimiser steps each. The policy and the value head share one trunk; the reference is a frozen copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from annotate.records import Record, write
from reward.batch import Example
from reward.sampler import Sample, Sampler
from reward.tokens import batch_of, forward, logprobs, logprobs_and_values, prompt_ids, rewards
from stages.ppo_math import gae, missing_eos, policy_loss, token_rewards, value_loss, whiten
from stages.run import Run


@dataclass
class PPOConfig(TrainingArguments):
    """TrainingArguments and the settings of PPO, under TRL's names where it had them.

    `per_device_train_batch_size * gradient_accumulation_steps` replies make one optimiser step.
    """

    total_episodes: int = field(default=6000, metadata={"help": "Replies sampled over the whole training."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in each pass."})
    kl_coef: float = field(default=0.05, metadata={"help": "Price of one nat of KL to the reference."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Clip of the value change, or none."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits, in sampling and in training."}
    )
    response_length: int = field(default=96, metadata={"help": "Most tokens of a reply."})
    missing_eos_penalty: float | None = field(
        default=1.0, metadata={"help": "For a reply without stop token."}
    )
    missing_eos_mode: Literal["subtract", "replace"] = field(
        default="subtract",
        metadata={"help": "Subtract the penalty from the score, or use its negative instead."},
    )
    target_kl: float | None = field(default=None, metadata={"help": "Approx. KL that ends an update early."})
    ratio_threshold: float | None = field(default=None, metadata={"help": "Mean ratio that skips a step."})
    adam_epsilon: float = 1e-5
    learning_rate: float = 3e-6
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing_eos_mode not in ("subtract", "replace"):
            raise ValueError(f"missing_eos_mode is subtract or replace, not {self.missing_eos_mode!r}")
        self.steps_per_update = self.num_ppo_epochs * self.num_mini_batches
        self.mini_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.rollout_size = self.mini_batch_size * self.num_mini_batches
        self.updates = self.total_episodes // self.rollout_size
        if self.updates == 0:
            raise ValueError(
                f"total_episodes={self.total_episodes} is less than one rollout ({self.rollout_size})"
            )


class Rollout(BaseModel):
    """One sampled reply, for the record and the plots."""

    step: int
    """Update, from 1."""
    id: str
    completion: str
    reward: float
    """Reward-model score, before penalty and KL."""
    kl: float
    """log pi - log pi_ref summed over the reply, nats."""
    length: int
    stopped: bool
    gold: float | None = None


@dataclass(frozen=True)
class Experience(Example):
    """A prompt with its sampled reply and, for each token of it, what the update needs."""

    old_logps: list[float]
    old_values: list[float]
    advantages: list[float]
    returns: list[float]


class PPO:
    """The objective: clipped policy loss and value loss, averaged over all tokens of the optimiser step."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.tokens = self.ratio = self.kl = 0.0  # of the present step

    def weight(self, examples: Sequence[Experience]) -> float:
        self.tokens = float(sum(len(example.completions[0]) for example in examples))
        self.ratio = self.kl = 0.0
        return max(1.0, self.tokens)

    def loss(self, model: nn.Module, examples: Sequence[Experience]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch_of(model, examples)
        logps, values = forward(model, batch, self.config.temperature)
        assert values is not None
        columns = ("old_logps", "old_values", "advantages", "returns")
        old_logps, old_values, advantages, returns = (
            batch.pad(torch.tensor([x for e in examples for x in getattr(e, name)], device=logps.device))
            for name in columns
        )
        of_policy, ratio = policy_loss(logps, old_logps, advantages, self.config.cliprange)
        of_value = value_loss(values, old_values, returns, self.config.cliprange_value)
        of_policy, of_value = (of_policy * batch.mask).sum(), (of_value * batch.mask).sum()
        with torch.no_grad():
            ratio = ratio[batch.mask]
            log_ratio = (logps - old_logps)[batch.mask]
            metrics = {
                "policy_loss": of_policy.detach(),
                "value_loss": of_value.detach(),
                "clip_fraction": ((ratio - 1).abs() > self.config.cliprange).float().sum(),
                "approx_kl": 0.5 * (log_ratio**2).sum(),
                "ratio": ratio.sum(),
            }
        self.ratio += float(metrics["ratio"]) / max(1.0, self.tokens)
        self.kl += float(metrics["approx_kl"]) / max(1.0, self.tokens)
        return of_policy + self.config.vf_coef * of_value, metrics


class RatioGuard(TrainerCallback):
    """Drops the gradients of a step whose mean ratio has run away, so that the optimiser skips it."""

    def __init__(self, objective: PPO, threshold: float):
        self.objective, self.threshold = objective, threshold

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.objective.ratio > self.threshold:
            kwargs["model"].zero_grad(set_to_none=True)


class Rollouts:
    """The batches of PPO: samples from the present policy, scored, turned into experience, then shuffled.

    A rollout is a function of (policy, seed, update), so training continues exactly from any update's end.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        reward: Any,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        objective: PPO,
        run: Run,
    ):
        self.policy, self.reference, self.reward = policy, reference, reward
        self.records, self.objective, self.config, self.run = records, objective, objective.config, run
        self.prompts = [prompt_ids(tokenizer, record.prompt) for record in records]
        self.sampler = Sampler(policy, tokenizer, self.config.response_length, self.config.temperature)
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return int(self.config.updates * self.config.steps_per_update)

    def start(self, step: int) -> Iterator[Sequence[Experience]]:
        first, within = divmod(step, self.config.steps_per_update)
        assert within == 0, "PPO continues from the end of an update"
        for update in range(first, self.config.updates):
            experience = self.rollout(update)
            stop = False
            for epoch in range(self.config.num_ppo_epochs):
                order = self._permutation(len(experience), update, epoch)
                for start in range(0, len(order), self.config.mini_batch_size):
                    yield [experience[i] for i in order[start : start + self.config.mini_batch_size]] * (
                        not stop
                    )
                    limit = self.config.target_kl
                    stop = stop or (limit is not None and self.objective.kl > limit)

    def rollout(self, update: int) -> list[Experience]:
        """Sample, score, and estimate advantages; keeps the rollout's metrics and writes its rows."""
        rows = self._draw_prompts(update)
        keys = [f"{self.config.seed}/ppo/{update}/{i}/{self.records[row].id}" for i, row in enumerate(rows)]
        samples = self.sampler.sample([self.prompts[row] for row in rows], keys)
        examples = [Example(self.prompts[row], (s.tokens,)) for row, s in zip(rows, samples, strict=True)]
        scores = [score for (score,) in rewards(self.reward, examples)]
        experience, kl = self._experience(examples, scores, samples)
        self._keep(update, rows, samples, scores, kl)
        return experience

    def _experience(
        self, examples: list[Example], scores: list[float], samples: list[Sample]
    ) -> tuple[list[Experience], list[float]]:
        """Experience of each reply, and its KL to the reference in nats."""
        config = self.config
        of_policy = [row for (row,) in logprobs_and_values(self.policy, examples, config.temperature)]
        of_reference = [row for (row,) in logprobs(self.reference, examples, config.temperature)]
        logps, mask = _padded([logps for logps, _ in of_policy])
        values, reference = _padded([v for _, v in of_policy])[0], _padded(of_reference)[0]
        kl = logps - reference
        stopped = [sample.stopped for sample in samples]
        final = missing_eos(scores, stopped, config.missing_eos_penalty, config.missing_eos_mode)
        reward = token_rewards(torch.tensor(final), kl, mask, config.kl_coef)
        advantages = gae(reward, values, mask, config.gamma, config.lam)
        returns = advantages + values
        advantages = whiten(advantages, mask)  # over the whole rollout; the returns stay as they are
        experience = [
            Experience(
                e.prompt, e.completions, lp, v, advantages[i, mask[i]].tolist(), returns[i, mask[i]].tolist()
            )
            for i, (e, (lp, v)) in enumerate(zip(examples, of_policy, strict=True))
        ]
        return experience, kl.sum(1).tolist()

    def _keep(
        self, update: int, rows: list[int], samples: list[Sample], scores: list[float], kl: list[float]
    ) -> None:
        kept = [
            Rollout(
                step=update + 1,
                id=self.records[row].id,
                completion=self.sampler.text(sample),
                reward=score,
                kl=nats,
                length=len(sample.tokens),
                stopped=sample.stopped,
            )
            for row, sample, score, nats in zip(rows, samples, scores, kl, strict=True)
        ]
        folder = self.run.path / "rollouts"
        folder.mkdir(exist_ok=True)
        write(folder / f"{update:06d}.jsonl", kept)
        logps = [x for sample in samples for x in sample.logprobs]
        self.metrics = summary(kept) | {"entropy": -sum(logps) / max(1, len(logps))}

    def _draw_prompts(self, update: int) -> list[int]:
        """Passes over all prompts, each freshly shuffled; a pass need not end with a rollout."""
        size, n = self.config.rollout_size, len(self.records)
        positions = range(update * size, (update + 1) * size)
        orders = {p: self._permutation(n, p, -1) for p in {position // n for position in positions}}
        return [orders[position // n][position % n] for position in positions]

    def _permutation(self, n: int, a: int, b: int) -> list[int]:
        seed = (self.config.seed * 1_000_003 + a) * 1009 + b + 1
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def summary(rows: Sequence[Rollout]) -> dict[str, float]:
    """Means over the replies of a rollout."""
    n = len(rows)
    return {
        "reward": sum(row.reward for row in rows) / n,
        "kl": sum(row.kl for row in rows) / n,
        "length": sum(row.length for row in rows) / n,
        "self_stopping": sum(row.stopped for row in rows) / n,
    }


def _padded(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Lists of length <= C -> (R, C) values and their mask."""
    width = max(1, *map(len, rows))
    values = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return values, mask
