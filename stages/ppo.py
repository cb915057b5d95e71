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
from stages.run import Run, is_writer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.ppo_rollout import Rollout

VERSION = 2


class Config(StageConfig):
    policy: Model
    reward: Model
    prompts: Records
    peft: dict[str, Any] | None = None
    """A configuration of the library peft, whose adapters are trained instead of all weights."""
    trainer: Annotated[dict[str, Any], KeysOf("stages.ppo_trainer.PPOConfig")] = {}


def main(config: Config, run: Run) -> None:
    from reward.model import save
    from reward.parallel import once
    from stages.adapters import configuration, merged
    from stages.engine import Reporting, train
    from stages.ppo_models import without_value
    from stages.ppo_rollout import summary

    records, policy, tokenizer, reward = load(config.policy, config.reward, config.prompts)
    trainer = recorded(run)(
        policy,
        reward,
        ppo_arguments(config.trainer, run),
        [{"prompt": [m.model_dump() for m in r.prompt], "id": r.id} for r in records],
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        peft_config=configuration(config.peft),
        callbacks=[Reporting(run, "PPO", ("reward", "kl", "length"))],
    )
    train(trainer, run)

    with without_value(trainer.model):
        save(merged(trainer.model), tokenizer, run.output("model"))
    rollouts = once(lambda: collect_rollouts(run))
    last = summary([row for row in rollouts if row.step == trainer.args.updates])
    run.record(**last, updates=trainer.args.updates, optimiser_steps=len(trainer.steps))
    stopping = last["self_stopping"]
    run.gate("stops by itself", stopping >= 0.9, f"{stopping:.0%} of the last rollout end by themselves")


def ppo_arguments(trainer: dict[str, Any], run: Run) -> Any:
    """PPOConfig; logs after each update, and saves where an update ends, since rollouts are not saved."""
    from stages.arguments import arguments
    from stages.ppo_trainer import PPOConfig

    draft = arguments(run, trainer, PPOConfig)
    steps = draft.steps_per_update
    args = arguments(run, {"logging_steps": steps, "save_steps": 10 * steps} | trainer, PPOConfig)
    if args.save_steps % steps:
        raise UserError(
            f"ppo.trainer.save_steps must be a multiple of the {steps} optimiser steps of one update"
        )
    return args


def recorded(run: Run) -> Any:
    """The trainer, every reply of its rollouts written down."""
    from stages.ppo_trainer import PPOTrainer

    class Recorded(PPOTrainer):
        def keep(self, rows: "Sequence[Rollout]") -> None:
            if is_writer():
                folder = run.path / "rollouts"
                folder.mkdir(exist_ok=True)
                write(folder / f"{rows[0].step - 1:06d}.jsonl", rows)

    return Recorded


def collect_rollouts(run: Run) -> "list[Rollout]":
    """Every reply of the training, those of earlier attempts included."""
    from stages.ppo_rollout import Rollout

    folder = run.path / "rollouts"
    rows = [row for part in sorted(folder.glob("*.jsonl")) for row in read(part, Rollout)]
    write(run.output("rollouts.jsonl"), rows)
    shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    from stages.cli import launch

    launch("ppo")
