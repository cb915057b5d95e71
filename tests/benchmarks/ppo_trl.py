"""The other side of the PPO benchmark: TRL 1.12's experimental PPOTrainer, in an environment of its own."""

import os
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from peft import LoraConfig
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.benchmarks.ppo_worker import (
    KL_COEF,
    LEARNING_RATE,
    LORA,
    TEMPERATURE,
    Size,
    Turns,
    classifier_of,
    policy_of,
    prompts_of,
    tokenizer_of,
    work,
)


def train(size: Size, mode: str, updates: int, turns: Turns, folder: str) -> None:
    """`best`: the only setting in which its minibatches are optimiser steps; `docs`: of its page; `lora`."""
    args = config_of(size, folder, updates, accumulated=size.batch if mode == "docs" else 1)
    # A batch more than is used: on the last one of a pass TRL would step at every micro-batch.
    rows = Dataset.from_dict({"input_ids": prompts_of(size, size.batch * (updates + 1))})
    watch_lengths(turns)
    trainer_of(size, args, rows, LoraConfig(**LORA) if mode == "lora" else None, callbacks=[turns]).train()


def config_of(size: Size, folder: str, updates: int, accumulated: int = 1, **others: Any) -> Any:
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size.batch // accumulated,
        gradient_accumulation_steps=accumulated,
        num_mini_batches=size.minibatches,
        num_ppo_epochs=size.epochs,
        total_episodes=size.batch * updates,
        local_rollout_forward_batch_size=size.batch,
        response_length=size.answer,
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        stop_token="eos",
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **others,
    )


def trainer_of(size: Size, args: Any, rows: Any, peft_config: Any = None, **others: Any) -> Any:
    models = {
        "model": policy_of(size),
        "ref_model": None if peft_config else policy_of(size).requires_grad_(False),
        "reward_model": classifier_of(size, 1).requires_grad_(False),
        "value_model": classifier_of(size, 2),
    }
    tokenizer = tokenizer_of(size)
    return PPOTrainer(
        args=args, processing_class=tokenizer, train_dataset=rows, peft_config=peft_config, **models | others
    )


def watch_lengths(turns: Turns) -> None:
    """Note how long its answers are, which no metric of it says."""
    real = ppo_trainer.truncate_response

    def watching(stop: int, pad: int, responses: Any) -> Any:
        result = real(stop, pad, responses)
        turns.lengths += (result != pad).sum(1).tolist()
        return result

    ppo_trainer.truncate_response = watching


if __name__ == "__main__":
    work(train)
