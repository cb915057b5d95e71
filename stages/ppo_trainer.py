"""PPO for language models, usable alone, in the conventions of TRL's trainers:

    trainer = PPOTrainer("path/or/hub-id", reward_funcs=score, args=PPOConfig("out"), train_dataset=prompts)
    trainer.train()

Follows Schulman et al. 2017 (PPO), Ziegler et al. 2019 and Stiennon et al. 2020 (language models), with the
details collected by Huang et al. 2024 ("The N+ Implementation Details of RLHF with PPO").

One update = `rollout` of `rollout_size` replies, their `score`, then an `update` of `num_ppo_epochs` passes
in `num_mini_batches` optimiser steps each. `train` does nothing else; a loop of one's own may call the three.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward.functions import RewardError, Rewards, RunningScale, Scores
from reward.model import disable_dropout
from reward.parallel import summed
from reward.paths import choose
from stages.adapters import with_adapters
from stages.engine import Engine
from stages.ppo_config import PPOConfig as PPOConfig
from stages.ppo_math import adapted_kl_coef
from stages.ppo_models import Prompts, Reference, add_value, policy, value_parameters, without_value
from stages.ppo_objective import PPO, Experience
from stages.ppo_rollout import (
    Actor,
    Clock,
    Replies,
    Rollout,
    experience,
    final_scores,
    peak_memory,
    rollout_rows,
    scaled,
    summary,
)

STATE = "ppo.pt"
"""In a checkpoint: what the files of the Trainer do not hold."""


class PPOTrainer(Engine):
    """PPO on any causal language model of transformers, with any reward.

    model, processing_class    a model, or the path or hub id of one; its tokenizer, or None to load it
    reward_funcs               function, sequence-classification model or path; or a list (`reward.functions`)
    train_dataset              rows with `prompt`, text or messages; other columns go to the reward functions
    eval_dataset               answered and scored every `eval_steps`
    ref_model                  None: adapters switched off, the layers as they were, or a frozen copy
    value_model                None: a value head on the policy's trunk. Else a sequence-classification model
    peft_config                trains adapters of peft in the place of all weights

    UserError for what the caller can mend, one line.
    """

    args: PPOConfig
    control: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        ref_model: Any = None,
        value_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        model, tokenizer = policy(model, processing_class)
        args = args or PPOConfig(f"{Path(model.name_or_path).name or 'model'}-PPO")
        self.prompts = Prompts(train_dataset or [], tokenizer, model, args.response_length)
        self.held_out = Prompts(eval_dataset or [], tokenizer, model, args.response_length)
        self.rewards = Rewards(reward_funcs, tokenizer, args.reward_weights, reward_processing_classes)
        model = disable_dropout(with_adapters(model, peft_config))
        reference = Reference(model, ref_model, args)
        add_value(model, value_model, self.rewards, args)
        self.clock = Clock()
        super().__init__(
            model,
            args,
            PPO(args, reference.prefix),
            _Updates(self, args),
            callbacks,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            optimizers=optimizers,
        )
        self.actor = Actor(model, tokenizer, reference, args, self.clock)
        self.kl_coef, self.scale, self.done = args.kl_coef, RunningScale(), 0

    # --- the three parts of an update

    def rollout(self, rows: Sequence[int] | None = None) -> Replies:
        """Replies of the present policy to rows of the training set, by default those whose turn it is.

        A function of policy, seed and number of updates done, so training continues exactly from their end.
        """
        rows = list(self._next_rows() if rows is None else rows)
        keys = [f"{self.args.seed}/ppo/{self.done}/{i}/{self.prompts.ids[row]}" for i, row in enumerate(rows)]
        return self.actor.answer(self.prompts, rows, keys)

    def score(self, replies: Replies, prompts: Prompts | None = None) -> Scores:
        """What the reward functions say; RewardError names the function, the prompt and the value."""
        prompts = prompts or self.prompts
        with self.clock("scoring"):
            return self.rewards(
                [prompts.prompts[row] for row in replies.rows],
                replies.texts,
                [prompts.tokens[row] for row in replies.rows],
                [sample.tokens for sample in replies.samples],
                {name: [column[row] for row in replies.rows] for name, column in prompts.columns.items()},
            )

    def update(self, replies: Replies, scores: Scores) -> dict[str, float]:
        """All optimiser steps on scored replies. Returns what `train` would have logged."""
        if self.optimizer is None:
            self.create_optimizer_and_scheduler(len(self.steps))
        for batch in self.minibatches(replies, scores):
            self.training_step(self.model, batch)
            if batch:
                self._clip_grad_norm(self.model)
                self.optimizer.step()
            self.lr_scheduler.step()
            self.model.zero_grad()
            self.state.global_step += 1
        return self.collected()

    def minibatches(self, replies: Replies, scores: Scores) -> Iterator[list[Experience]]:
        """The optimiser steps of one update; empty ones once `target_kl` is passed."""
        found = self._experience(replies, scores)
        if self.done == 0 or not hasattr(self.model, "path"):
            choose(self.model, found)
        objective: Any = self.objective
        objective.trains_policy = self.done >= self.args.critic_warmup
        stop = False
        with self.clock("update"):
            for epoch in range(self.args.num_ppo_epochs):
                order = self._permutation(len(found), self.done, epoch)
                for start in range(0, len(order), self.args.mini_batch_size):
                    chosen = order[start : start + self.args.mini_batch_size]
                    last = epoch == self.args.num_ppo_epochs - 1 and start + len(chosen) == len(order)
                    self.done += last  # before the step: a checkpoint is written right after it
                    yield [] if stop else [found[i] for i in chosen]
                    limit = self.args.target_kl
                    stop = stop or (limit is not None and objective.kl > limit)

    def _experience(self, replies: Replies, scores: Scores) -> list[Experience]:
        used = scores
        if self.args.scale_rewards:
            self.scale.update(scores.totals)
            used = scaled(scores, self.scale)
        finals = final_scores(replies, used, self.args)
        found = experience(replies, used, finals, self.args, self.kl_coef)
        rows = rollout_rows(replies, scores, self.prompts.ids, self.done + 1)
        self.keep(rows)
        self.steps.metrics = self._metrics(replies, scores, rows) | {"kl_coef": self.kl_coef}
        if self.args.kl_target is not None:
            kl, n = self.steps.metrics["kl"], len(rows)
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, self.args.kl_target, n, self.args.kl_horizon)
        return found

    def _metrics(self, replies: Replies, scores: Scores, rows: list[Rollout]) -> dict[str, float]:
        sampled = [logp for sample in replies.samples for logp in sample.logprobs]
        found = summary(rows) | {"entropy": -sum(sampled) / max(1, len(sampled))}
        if len(scores.by_function) > 1:
            found |= {f"reward/{name}": sum(of) / len(of) for name, of in scores.by_function.items()}
        trained = [
            logp
            for e, s in zip(replies.experience, replies.samples, strict=True)
            for logp in e.old_logps[: len(s.tokens)]
        ]
        found["sampling_kl"] = (sum(sampled) - sum(trained)) / max(1, len(sampled))
        return found | self.clock.take() | {"memory/peak_mib": peak_memory(self.args.device)}

    def keep(self, rows: Sequence[Rollout]) -> None:
        """Called with every rollout; for subclasses that write it down."""

    def _next_rows(self) -> list[int]:
        """Passes over all prompts, each freshly shuffled; a pass need not end with a rollout."""
        size, n = self.args.rollout_size, len(self.prompts.tokens)
        positions = range(self.done * size, (self.done + 1) * size)
        orders = {p: self._permutation(n, p, -1) for p in {position // n for position in positions}}
        return [orders[position // n][position % n] for position in positions]

    def _permutation(self, n: int, a: int, b: int) -> list[int]:
        seed = (self.args.seed * 1_000_003 + a) * 1009 + b + 1
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()

    # --- what transformers' Trainer calls

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reward, KL, length and self-stopping on held-out prompts; the same draws each time."""
        prompts = self.held_out
        if eval_dataset is not None:
            prompts = Prompts(eval_dataset, self.actor.tokenizer, self.model, self.args.response_length)
        rows = list(range(len(prompts.tokens)))
        replies = self.actor.answer(prompts, rows, [f"{self.args.seed}/eval/{row}" for row in rows])
        found = summary(rollout_rows(replies, self.score(replies, prompts), prompts.ids, self.done))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The Trainer's, the value's own parameters in groups of their own where they have their own rate."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            own = {id(p) for p in value_parameters(self.model)}
            for group in list(optimizer.param_groups):
                of_value = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if of_value:
                    rate = {"params": of_value, "lr": self.args.value_learning_rate}
                    optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, **rate})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: Sequence[Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        objective: Any = self.objective
        if inputs:
            whole = summed({"ratio": objective.ratio, "kl": objective.kl})
            objective.ratio, objective.kl = whole["ratio"], whole["kl"]  # all processes stop for one reason
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Drop the gradients of a step whose mean ratio has run away, so that the optimiser skips it."""
        objective: Any = self.objective
        if self.args.ratio_threshold is not None and objective.ratio > self.args.ratio_threshold:
            model.zero_grad(set_to_none=True)
        return super()._clip_grad_norm(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy without its value, as `from_pretrained` reads it."""
        with without_value(self.model):
            super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:  # a checkpoint
            torch.save(self._state(), Path(output_dir) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = torch.load(Path(resume_from_checkpoint) / STATE, weights_only=True)
        self.done, self.kl_coef = state["done"], state["kl_coef"]
        self.scale.load_state_dict(state["scale"])
        for parameter, value in zip(value_parameters(self.model), state["value"], strict=True):
            parameter.data.copy_(value)

    def _state(self) -> dict[str, Any]:
        value = [parameter.detach() for parameter in value_parameters(self.model)]
        return {"done": self.done, "kl_coef": self.kl_coef, "scale": self.scale.state_dict(), "value": value}


class _Updates:
    """The training as the engine sees it: optimiser steps, of which a number make an update."""

    def __init__(self, trainer: PPOTrainer, args: PPOConfig):
        self.trainer, self.args = trainer, args
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return int(self.args.updates * self.args.steps_per_update)

    def start(self, step: int) -> Iterator[Sequence[Experience]]:
        first, within = divmod(step, self.args.steps_per_update)
        assert within == 0, "PPO continues from the end of an update"
        self.trainer.done = first
        for _ in range(first, self.args.updates):
            replies = self.trainer.rollout()
            try:
                scores = self.trainer.score(replies)
            except RewardError:
                self._save()
                raise
            yield from self.trainer.minibatches(replies, scores)

    def _save(self) -> None:
        """What was trained so far is not lost to a reward function that fails."""
        trainer: Any = self.trainer
        folder = Path(self.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if trainer.state.global_step and not folder.exists():
            with suppress(OSError):  # a full disk: the error of the reward function says more
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(self.args, trainer.state, trainer.control)
