"""RLOO: REINFORCE against the reward model, each reply measured by the others to the same prompt (TRL).

    prefloop rloo configs/frontier.yaml rloo.trainer.beta=0.1

Reads    policy     where training starts; the same weights, frozen, are the reference
         reward     the reward model, of the same tokenizer
         prompts    records; those of use `policy` in the training split are answered
Writes   model/     the optimised policy

Ahmadian et al. 2024 (arXiv 2402.14740): no value head; `trainer.beta` is the price of one nat of KL to the
reference, as `kl_coef` is for PPO. One round draws `generation_batch_size` replies, `num_generations` to each
prompt, and goes over them `num_iterations` times. metrics.jsonl: `score` of the reward model should rise,
`self_stopping` stay near 1; `kl` is in nats per token here; `reward` is the score after the penalty for
replies that do not stop.
"""

from typing import Annotated, Any

from stages import online
from stages.config import KeysOf
from stages.run import Run

VERSION = 1


class Config(online.Settings):
    trainer: Annotated[dict[str, Any], KeysOf("trl.RLOOConfig")] = {}


def main(config: Config, run: Run) -> None:
    from trl import RLOOConfig, RLOOTrainer

    online.optimise(config, run, RLOOTrainer, RLOOConfig)


if __name__ == "__main__":
    from stages.cli import launch

    launch("rloo")
