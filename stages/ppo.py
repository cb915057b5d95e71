"""PPO: optimise the policy against the reward model, with a price on moving away from where it started.

    prefloop ppo configs/quickstart.yaml ppo.trainer.kl_coef=0.1

Reads    policy          where training starts; the same weights, frozen, are the reference
         reward          the reward model, of the same tokenizer
         prompts         records; those of use `policy` in the training split are answered
Writes   model/          the optimised policy
         rollouts.jsonl  every reply sampled on the way, with its score and KL

metrics.jsonl, one line for each update: `reward` (score of the reward model) should rise; `kl` (nats per
reply) should rise and then hold, a steady climb means kl_coef is too low; `self_stopping` should stay near 1;
`entropy` falls slowly, a collapse means repetition; `clip_fraction` is healthy below 0.3; `approx_kl` between
the passes of one update below 0.05; `value_loss` falls.
"""

import shutil
from typing import TYPE_CHECKING, Annotated, Any

from annotate.records import read, write
from stages.config import KeysOf, Model, Records, StageConfig, UserError
from stages.online import load
from stages.run import Run

if TYPE_CHECKING:
    from stages.ppo_trainer import Rollout

VERSION = 1


class Config(StageConfig):
    policy: Model
    reward: Model
    prompts: Records
    trainer: Annotated[dict[str, Any], KeysOf("stages.ppo_trainer.PPOConfig")] = {}


def main(config: Config, run: Run) -> None:
    from torch import nn

    from reward.model import load_policy, save
    from stages.engine import Engine, Reporting, train
    from stages.ppo_trainer import PPO, RatioGuard, Rollouts, summary

    records, policy, tokenizer, reward = load(config.policy, config.reward, config.prompts)
    reference = load_policy(config.policy)[0].requires_grad_(False)

    policy.value_head = nn.Linear(policy.config.hidden_size, 1).to(policy.device)
    nn.init.zeros_(policy.value_head.weight)  # values start at 0 and leave the trunk alone at first
    nn.init.zeros_(policy.value_head.bias)
    args = ppo_arguments(config.trainer, run)
    objective = PPO(args)
    rollouts = Rollouts(policy, reference, reward, tokenizer, records, objective, run)
    callbacks = [Reporting(run, "PPO", ("reward", "kl", "length"))]
    if args.ratio_threshold is not None:
        callbacks.append(RatioGuard(objective, args.ratio_threshold))
    train(Engine(policy, args, objective, rollouts, callbacks), run)

    del policy.value_head
    save(policy, tokenizer, run.output("model"))
    last = summary([row for row in collect_rollouts(run) if row.step == args.updates])
    run.record(**last, updates=args.updates, optimiser_steps=len(rollouts))
    stopping = last["self_stopping"]
    run.gate("stops by itself", stopping >= 0.9, f"{stopping:.0%} of the last rollout end by themselves")


def ppo_arguments(trainer: dict[str, Any], run: Run) -> Any:
    """PPOConfig; logs after each update, and saves where an update ends, since rollouts are not saved."""
    from stages.engine import arguments
    from stages.ppo_trainer import PPOConfig

    draft = arguments(run, trainer, PPOConfig)
    steps = draft.steps_per_update
    args = arguments(run, {"logging_steps": steps, "save_steps": 10 * steps} | trainer, PPOConfig)
    if args.save_steps % steps:
        raise UserError(
            f"ppo.trainer.save_steps must be a multiple of the {steps} optimiser steps of one update"
        )
    return args


def collect_rollouts(run: Run) -> "list[Rollout]":
    """Every reply of the training, those of earlier attempts included."""
    from stages.ppo_trainer import Rollout

    folder = run.path / "rollouts"
    rows = [row for part in sorted(folder.glob("*.jsonl")) for row in read(part, Rollout)]
    write(run.output("rollouts.jsonl"), rows)
    shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    from stages.cli import launch

    launch("ppo")
