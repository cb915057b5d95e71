"""Our side of the PPO benchmark. What it needs of our trainer is all in `trainer_of`."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from stages.ppo_trainer import PPOConfig, PPOTrainer
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


class Watched(PPOTrainer):
    """Tells the benchmark how long its answers are."""

    turns: Turns | None = None

    def keep(self, rows: Sequence[Any]) -> None:
        if self.turns:
            self.turns.lengths += [row.length for row in rows]


def trainer_of(size: Size, mode: str, updates: int, folder: str, turns: Turns | None = None) -> Watched:
    """`same`: with a value model of its own, the score where TRL puts it; `default`; `lora`; `frozen`."""
    own = {
        "same": {"score_slot": "post_eos"},
        "default": {},
        "lora": {},
        "frozen": {"train_layers": f"last:{size.layers // 2}"},
    }[mode]
    args = PPOConfig(
        folder,
        per_device_train_batch_size=size.minibatch,
        num_mini_batches=size.minibatches,
        num_ppo_epochs=size.epochs,
        total_episodes=size.batch * updates,
        response_length=size.answer,
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        missing_eos_penalty=None,
        logging_steps=size.epochs * size.minibatches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **own,
    )
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts_of(size, size.batch * updates)]
    tokenizer = tokenizer_of(size)
    trainer = Watched(
        model=policy_of(size),
        reward_funcs=classifier_of(size, 1),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        value_model=classifier_of(size, 2) if mode == "same" else None,
        peft_config=LoraConfig(**LORA) if mode == "lora" else None,
        callbacks=[turns] if turns else None,
    )
    trainer.turns = turns
    return trainer


def train(size: Size, mode: str, updates: int, turns: Turns, folder: str) -> None:
    trainer_of(size, mode, updates, folder, turns).train()


if __name__ == "__main__":
    work(train)
