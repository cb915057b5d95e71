"""GRPO: policy gradient against the reward model, advantages scaled among the replies to a prompt (TRL).

    prefloop grpo configs/frontier.yaml grpo.trainer.beta=0.1

Reads    policy     where training starts; the same weights, frozen, are the reference
         reward     the reward model, of the same tokenizer
         prompts    records; those of use `policy` in the training split are answered
Writes   model/     the optimised policy

Shao et al. 2024 (arXiv 2402.03300). `trainer.beta` weighs a KL per token in the loss (0.04 unless set, as in
the paper; TRL's own default leaves the reference out), so it does not compare with PPO's `kl_coef` or RLOO's
`beta`. One round draws `generation_batch_size` replies, `num_generations` to each prompt, and goes over them
`num_iterations` times. metrics.jsonl: as for RLOO.
"""

from typing import Annotated, Any

from stages import online
from stages.config import KeysOf
from stages.run import Run

VERSION = 1


class Config(online.Settings):
    trainer: Annotated[dict[str, Any], KeysOf("trl.GRPOConfig")] = {}


def main(config: Config, run: Run) -> None:
    from trl import GRPOConfig, GRPOTrainer

    online.optimise(config, run, GRPOTrainer, GRPOConfig, beta=0.04)


if __name__ == "__main__":
    from stages.cli import launch

    launch("grpo")
