"""The training engine: one `transformers.Trainer` for every method; an objective says what the loss is.

One batch of the loader is one optimiser step: a fixed number of examples, split here into micro-batches of
similar length under a token budget, each weighted so that the loss is normalised over the whole step. The
result does not depend on how the step was split. Callbacks, clipping, schedules, checkpoints and resume are
the Trainer's own.
"""

import ctypes
import math
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from reward.parallel import once, place, sum_gradients, summed, wait
from reward.paths import choose, describe
from reward.tokens import grouped, token_budget
from stages.arguments import EngineArguments
from stages.config import UserError
from stages.not_finite import not_finite, of_tasks, report_skipped
from stages.run import Run, is_writer

COMPLETE = "complete"
"""Marks a checkpoint folder whose files are all there: the Trainer writes them one after another."""

MAX_SKIPPED = 10
"""Steps in a row without a finite gradient at which training ends."""


class Objective(Protocol):
    """What one optimiser step minimises: `loss` summed over its micro-batches, divided by `weight`."""

    def weight(self, examples: Sequence[Any]) -> float:
        """Normaliser of a whole step: its number of examples, pairs or tokens."""

    def loss(self, model: nn.Module, examples: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, summed metrics) of one micro-batch; both are divided by the weight of the step."""


class Steps(Protocol):
    """Where the batches come from; its length is the exact number of optimiser steps of the training."""

    metrics: dict[str, float]
    """What to log beside the loss."""

    def __len__(self) -> int: ...

    def start(self, step: int) -> Iterator[Sequence[Any]]:
        """The batches from optimiser step `step` on, a function of the seed and the step alone.

        An empty batch is a step that changes nothing.
        """


class Epochs:
    """Passes over a list of examples, freshly shuffled each time; the last batch of a pass may be short."""

    def __init__(self, examples: Sequence[Any], args: TrainingArguments):
        self.examples, self.seed = examples, args.seed
        self.metrics: dict[str, float] = {}
        self.size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.per_epoch = math.ceil(len(examples) / self.size)
        total = math.ceil(args.num_train_epochs * self.per_epoch)
        self.total: int = args.max_steps if args.max_steps > 0 else total

    def __len__(self) -> int:
        return self.total

    def start(self, step: int) -> Iterator[Sequence[Any]]:
        order: list[int] = []
        for number in range(step, self.total):
            epoch, index = divmod(number, self.per_epoch)
            if not order or not index:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                order = torch.randperm(len(self.examples), generator=generator).tolist()
            yield [self.examples[i] for i in order[index * self.size : (index + 1) * self.size]]


class Engine(Trainer):
    """Trains `model` on the batches of `steps` under `objective`."""

    def __init__(
        self,
        model: nn.Module,
        args: EngineArguments,
        objective: Objective,
        steps: Steps,
        callbacks: list[TrainerCallback] | None = None,
        **trainer: Any,
    ):
        args.max_steps, args.gradient_accumulation_steps = len(steps), 1  # a batch is the whole step already
        args.ignore_data_skip = True  # the loader below starts where training stopped
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # a loss that is not finite has to be seen
        args.max_grad_norm = args.max_grad_norm or math.inf  # without clipping the norm is still looked at
        _keep_freed_memory()
        super().__init__(model=model, args=args, callbacks=callbacks, **trainer)
        for part in (model, getattr(model, "value_model", None)):
            if part is not None:  # the Trainer would wrap `forward` alone, and our passes run the trunk
                part.mixed_precision = _MIXED.get(self.accelerator.mixed_precision)
        if isinstance(steps, Epochs):
            choose(model, steps.examples)
        self.objective, self.steps = objective, steps
        self.max_tokens = args.max_tokens_per_batch
        self.sums: dict[str, float] = defaultdict(float)
        self.skipped = 0
        self.not_finite: Counter[str] = Counter()
        """How often the loss of a task was not a finite number."""

    def get_train_dataloader(self) -> Any:
        return _Loader(self)

    def training_step(
        self, model: nn.Module, inputs: Sequence[Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one whole optimiser step, micro-batch by micro-batch."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        if not inputs:
            return total
        weight, found = self.objective.weight(inputs), 0.0
        mine = _my_share(inputs)
        for group in grouped(self.model, mine, self.max_tokens):
            found += self._pass([mine[i] for i in group], weight)
        sum_gradients(self.model.parameters())
        self.sums["steps"] += 1
        return total + found * place()[1]  # the Trainer takes the mean over the processes

    def _pass(self, examples: Sequence[Any], weight: float) -> float:
        """Forward and backward of one micro-batch; returns its part of the loss."""
        try:
            with self.compute_loss_context_manager():
                loss, metrics = self.objective.loss(self.model, examples)
            self.accelerator.backward(loss / weight)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory (step {self.state.global_step + 1}, in a pass of up to "
                f"{self.max_tokens or token_budget(self.model):,} tokens): set "
                "trainer.max_tokens_per_batch to fewer, or trainer.activation_checkpointing"
            ) from None
        for name, value in metrics.items():
            self.sums[name] += float(value) / weight
        found = float(loss.detach())
        if not math.isfinite(found):
            self.not_finite.update(not_finite(self.objective, self.model, examples))
        return found / weight

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip; drop the gradients of a step whose norm is not finite, so that the optimiser skips it."""
        norm: Tensor = super()._clip_grad_norm(model)
        if torch.isfinite(norm):
            self.skipped = 0
            return norm
        self.skipped += 1
        self.sums["skipped_steps"] += 1
        model.zero_grad(set_to_none=True)
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"no finite gradient in {self.skipped} steps in a row (step {self.state.global_step + 1}): "
                f"lower trainer.learning_rate{of_tasks(self.not_finite)}"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.collected()
        super().log(logs, start_time)

    def collected(self) -> dict[str, float]:
        """Means of the metrics over the optimiser steps since they were last collected."""
        steps = max(1.0, self.sums.pop("steps", 0.0))
        skipped = self.sums.pop("skipped_steps", 0.0)
        found = {name: value / steps for name, value in summed(self.sums).items()} | self.steps.metrics
        self.sums.clear()
        return found | ({"skipped_steps": skipped} if skipped else {})

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _my_share(examples: Sequence[Any]) -> Sequence[Any]:
    """What this process does of a step: as long as the shares of the others."""
    rank, size = place()
    return examples if size == 1 else sorted(examples, key=lambda e: sum(e.row_lengths(False)))[rank::size]


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, which asks for tensors of the same sizes.

    By default it gives large blocks back to the system, and every step pays for the page faults of getting
    them again: about a tenth of a step of a small model. Other C libraries are left alone.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the most that 64-bit glibc takes


class _Loader:
    """Hands the steps to the Trainer one at a time.

    accelerate's loader would fetch one batch ahead: for PPO, sample from a policy that lacks its last step.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.dataset = range(len(engine.steps))  # the Trainer asks for its length

    def __len__(self) -> int:
        return len(self.engine.steps)

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return self.engine.steps.start(self.engine.state.global_step)


class Reporting(TrainerCallback):
    """Connects a Trainer to its run: progress, metrics.jsonl, and the mark that a checkpoint is whole."""

    def __init__(self, run: Run, description: str, shown: Sequence[str] = ("loss",)):
        self.run, self.description, self.shown = run, description, shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.run.progress(self.description, total=state.max_steps, unit="steps").__enter__()
        self.bar.advance(state.global_step)
        if path := getattr(kwargs["model"], "path", None):
            self.run.record(path=describe(path))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        numbers = {k: v for k, v in logs.items() if isinstance(v, int | float) and not _of_machine(k)}
        if "train_loss" not in numbers:
            self.run.log(step=state.global_step, **numbers)
            self.bar.advance(0, **{name: numbers[name] for name in self.shown if name in numbers})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()  # until every process has written its part
        if is_writer():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.__exit__(None, None, None)


def _of_machine(name: str) -> bool:
    """Does the metric differ from run to run, where metrics.jsonl does not?"""
    return name in _CLOCK or name.startswith(("seconds/", "memory/"))


_CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "epoch"}


def train(engine: Trainer, run: Run) -> None:
    """Train to the end, from the newest whole checkpoint of an earlier attempt if there is one."""
    if place()[1] > 1 and not isinstance(engine, Engine):
        raise UserError("TRL trains it, in one process here: run it without torchrun")
    engine.remove_callback(PrinterCallback)  # what it prints is in the progress line and in metrics.jsonl
    folder = Path(engine.args.output_dir)
    newest = once(lambda: _newest(folder))
    if newest is not None:
        run.say(f"continuing from {newest.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # TRL asks for it
        engine.train(resume_from_checkpoint=str(newest) if newest else None)
    if isinstance(engine, Engine):
        report_skipped(engine.state, engine.not_finite, engine.sums["skipped_steps"], run)
    engine.model.mixed_precision = None  # what comes after training is in full precision
    once(lambda: _remove(folder))


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    found = list(folder.glob("checkpoint-*"))
    whole = [path for path in found if (path / COMPLETE).exists()]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _remove(folder: Path) -> None:
    for mark in folder.glob(f"checkpoint-*/{COMPLETE}"):
        mark.unlink()  # a folder half removed must not look whole
    shutil.rmtree(folder, ignore_errors=True)
