"""What RLOO and GRPO share: TRL's trainers that sample from the policy, rewarded by a reward model of ours.

The tokens are those of the other stages: TRL renders a prompt by the same chat template, and the reward model
reads the ids that were sampled, the stop token included, never text that was tokenized again.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from annotate.records import Record, read
from stages.config import Model, Records, StageConfig, UserError
from stages.run import Run

SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
}
"""The distribution that KL and the gradient speak of, and evaluation draws from."""


class Settings(StageConfig):
    policy: Model
    reward: Model
    prompts: Records
    missing_eos_penalty: float | None = 1.0
    """For a reply without stop token, in units of the reward. None: nothing happens to it."""
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    """Subtract the penalty from the score, or use its negative instead."""
    trainer: dict[str, Any] = {}


def load(policy: str, reward: str, prompts: str) -> tuple[list[Record], Any, Any, Any]:
    """(prompts to train on, policy, its tokenizer, reward model), which must share a vocabulary."""
    from reward.model import load_policy, load_reward, same_vocabulary

    records = [r for r in read(prompts, Record) if r.split == "train" and r.use == "policy"]
    if not records:
        raise UserError(f"{prompts}: no prompt of use `policy` in the training split")
    model, tokenizer = load_policy(policy)
    reward_model, reward_tokenizer = load_reward(reward)
    if not same_vocabulary(tokenizer, reward_tokenizer):
        raise UserError(f"the reward model {reward} has another vocabulary than the policy {policy}")
    return records, model, tokenizer, reward_model


def optimise(config: Settings, run: Run, trainer_class: Any, kind: Any, **defaults: Any) -> None:
    """Train the policy by TRL's `trainer_class`, whose settings are of `kind`, and write it."""
    from datasets import Dataset

    from reward.model import check_decoder, save
    from stages.engine import Reporting, train

    records, policy, tokenizer, reward = load(config.policy, config.reward, config.prompts)
    check_decoder(policy, config.policy)
    args = online_arguments(config.trainer, run, kind, defaults)
    trainer = in_own_order(trainer_class)(
        model=policy,
        reward_funcs=Scorer(reward, tokenizer, config),
        args=args,
        train_dataset=Dataset.from_list(rows(policy, tokenizer, records, args.max_completion_length)),
        processing_class=tokenizer,
        callbacks=[Reporting(run, run.stage.upper(), ("score", "kl", "self_stopping"))],
    )
    if trainer.ref_model is not None:  # TRL read it from the disk, without the pad token we may have added
        trainer.ref_model.resize_token_embeddings(policy.get_input_embeddings().weight.shape[0])
        trainer.ref_model.load_state_dict(policy.state_dict())
    train(trainer, run)
    save(policy, tokenizer, run.output("model"))

    steps = trainer.state.max_steps
    run.record(optimiser_steps=steps, replies=sampled(args, steps))
    stopping = [logs["self_stopping"] for logs in trainer.state.log_history if "self_stopping" in logs][-1]
    run.gate("stops by itself", stopping >= 0.9, f"{stopping:.0%} of the last replies end by themselves")


def in_own_order(trainer_class: Any) -> Any:
    """The trainer, its prompts in an order that depends on seed and pass alone, not on the passes before."""

    class Trainer(trainer_class):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            seed = 1_000_003 * self.args.seed
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)
            return sampler

    return Trainer


def online_arguments(block: dict[str, Any], run: Run, kind: Any, defaults: dict[str, Any]) -> Any:
    """TRL's settings; logs after each round of sampling, and saves where one ends: samples are lost."""
    from stages.arguments import arguments

    fixed = {"bf16": False, "activation_checkpointing": False}
    draft = arguments(run, block, kind, **fixed, **defaults)
    passes = draft.steps_per_generation * draft.num_iterations  # backward passes over one round
    steps = passes // math.gcd(passes, draft.gradient_accumulation_steps)
    own = {"logging_steps": steps, "save_steps": 10 * steps}
    args = arguments(run, own | block, kind, **fixed, **defaults)
    if args.save_steps % steps:
        raise UserError(
            f"{run.stage}.trainer.save_steps must be a multiple of the {steps} optimiser steps of one round"
        )
    changed = [name for name, value in SAMPLING.items() if getattr(args, name) != value]
    if changed:
        raise UserError(
            f"{run.stage}.trainer.{changed[0]}: replies are drawn at temperature 1 from the whole "
            "distribution, which KL and reward are about: leave it out"
        )
    return args


def sampled(args: Any, steps: int) -> int:
    """Replies drawn in so many optimiser steps: what `total_episodes` is for PPO."""
    rounds = steps * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    return math.ceil(float(rounds)) * int(args.generation_batch_size)


def rows(policy: Any, tokenizer: Any, records: Sequence[Record], reply: int) -> list[dict[str, Any]]:
    """For each record its messages, which TRL will render, and their token ids."""
    from reward.model import longest_row
    from reward.tokens import prompts_ids

    made = []
    limit = longest_row(policy)
    prompts = prompts_ids(tokenizer, [record.prompt for record in records])
    for record, ids in zip(records, prompts, strict=True):
        if len(ids) + reply > limit:
            raise UserError(
                f"record {record.id}: a prompt of {len(ids)} tokens and a reply of {reply} do not fit "
                f"the {limit} positions of the model"
            )
        made.append({"prompt": [m.model_dump() for m in record.prompt], "ids": ids})
    return made


class Scorer:
    """TRL's reward function: the reward model's score of the sampled tokens, and PPO's rule for stopping."""

    __name__ = "reward_model"

    def __init__(self, model: Any, tokenizer: Any, config: Settings):
        self.model, self.stop, self.config = model, tokenizer.eos_token_id, config

    def __call__(
        self, ids: list[list[int]], completion_ids: list[list[int]], log_metric: Any, **_: Any
    ) -> list[float]:
        from reward.batch import Example
        from reward.tokens import rewards
        from stages.ppo_math import missing_eos

        examples = [Example(p, (reply,)) for p, reply in zip(ids, completion_ids, strict=True)]
        scores = [score for (score,) in rewards(self.model, examples)]
        stopped = [reply[-1:] == [self.stop] for reply in completion_ids]
        log_metric("score", sum(scores) / len(scores))
        log_metric("self_stopping", sum(stopped) / len(stopped))
        return missing_eos(scores, stopped, self.config.missing_eos_penalty, self.config.missing_eos_mode)
