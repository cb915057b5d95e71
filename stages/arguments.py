"""Settings of a training: the `trainer:` block of a stage."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from reward.parallel import place
from stages.run import Run

UNUSED = {
    "label_smoothing_factor": 0.0,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": False,
    "auto_find_batch_size": False,
}
"""Of TrainingArguments, with their defaults: refused rather than ignored."""


@dataclass
class EngineArguments(TrainingArguments):
    """TrainingArguments, of which `per_device_train_batch_size * gradient_accumulation_steps` examples make a
    step whatever its memory; how much of it is computed at once is a setting of its own."""

    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a forward and backward pass (one example at least): fewer take less "
            "memory and change the last digits of a result. None: what fits the machine."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch is {self.max_tokens_per_batch}: give 1 or more")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.num_train_epochs <= 0 >= self.max_steps:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs:g}: give more than 0, or max_steps")
        for name, default in UNUSED.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}: the engine does not use it; leave it out")


def arguments(run: Run, trainer: dict[str, Any], kind: Any = EngineArguments, **defaults: Any) -> Any:
    """Arguments of this `kind`: our defaults, then the `trainer:` block of the config."""
    common = {
        "output_dir": str(run.path / "checkpoints"),
        "seed": run.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 2,  # one would be deleted before the next is known to be whole
        "dataloader_pin_memory": False,
    }
    if place()[1] > 1 and not torch.cuda.is_available():
        common |= {"use_cpu": True, "ddp_backend": "gloo"}
    return kind(**(common | defaults | trainer))
