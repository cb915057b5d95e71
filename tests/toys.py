"""Stages that take no time, for tests of the runner: `make` -> `train` -> `gather`.

As a program it is `prefloop` with these stages: `python -m tests.toys run CONFIG`.
"""

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest

from stages import cli, config
from stages.config import KeysOf, Model, NotInKey, Reads, StageConfig, UserError
from stages.manifest import replace
from stages.run import Run


class MakeConfig(StageConfig):
    seed: int = 0
    text: str = "x"
    """What to write."""
    source: Annotated[str, Reads("")] | None = None
    shown: Annotated[int, NotInKey()] = 0


def make(config: MakeConfig, run: Run) -> None:
    text = Path(config.source).read_text() if config.source else config.text
    run.output("data.txt").write_text(text)
    run.record(length=len(text))


class TrainConfig(StageConfig):
    data: Annotated[str, Reads("data.txt")]
    mixture: dict[str, Annotated[str, Reads("data.txt")]] = {}
    steps: int = 3
    pause: Annotated[float, NotInKey()] = 0.0
    """Seconds for each step."""
    end: Annotated[Literal["well", "user", "crash", "full", "interrupt", "gate", "lie"], NotInKey()] = "well"


def train(config: TrainConfig, run: Run) -> None:
    """Keeps a checkpoint after every step, and notes how many steps it took itself."""
    checkpoint = run.path / "checkpoint"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with run.progress("training", total=config.steps, unit="steps") as bar:
        bar.advance(first)
        for step in range(first, config.steps):
            run.log(step=step, loss=1 / (step + 1))
            bar.advance(1, loss=1 / (step + 1))
            time.sleep(config.pause)
            replace(checkpoint, str(step + 1))
    run.record(resumed_at=first)
    weights = run.output("weights")
    if config.end != "lie":
        weights.mkdir(exist_ok=True)
        (weights / "all.txt").write_text(f"{Path(config.data).read_text()} {run.seed}")
    finish(config.end, run)


def finish(end: str, run: Run) -> None:
    if end == "user":
        raise UserError("the data is bad: mend it")
    if end == "crash":
        raise IndexError("list index out of range\n  and more")
    if end == "interrupt":
        raise KeyboardInterrupt
    if end == "full":
        with open("/dev/full", "w") as file:
            file.write("x" * 10_000)
    run.gate("good enough", end != "gate", "3 of 10")


class TuneConfig(StageConfig):
    model: Model
    trainer: Annotated[dict[str, Any], KeysOf("transformers.TrainingArguments")] = {}


def tune(config: TuneConfig, run: Run) -> None:
    import torch

    run.output("model").mkdir(exist_ok=True)
    (run.output("model") / "draw.txt").write_text(f"{torch.rand(1).item()}")


class GatherConfig(StageConfig):
    trained: Annotated[list[str], Reads("weights", every_seed=True)]


def gather(config: GatherConfig, run: Run) -> None:
    texts = [(Path(path) / "all.txt").read_text() for path in config.trained]
    run.output("all.txt").write_text("\n".join(texts))


KINDS = {
    "make": (MakeConfig, make),
    "train": (TrainConfig, train),
    "tune": (TuneConfig, tune),
    "gather": (GatherConfig, gather),
}


def install(patch: pytest.MonkeyPatch) -> None:
    for kind, (settings, main) in KINDS.items():
        module = ModuleType(f"stages.{kind}", f"{kind.title()}: a toy.\n\nReads    nothing\nWrites   files")
        module.__dict__.update(Config=settings, main=main, VERSION=1)
        patch.setitem(sys.modules, f"stages.{kind}", module)
    patch.setattr(config, "STAGES", tuple(KINDS))
    patch.setattr(cli, "STAGES", tuple(KINDS))


EXPERIMENT = """\
name: toy
seed: 0
stages:
  make: {text: hello}
  train: {data: make}
  gather: {trained: train}
"""

if __name__ == "__main__":
    install(pytest.MonkeyPatch())
    sys.exit(cli.main())
