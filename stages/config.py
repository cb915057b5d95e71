"""Settings: one experiment file, `stage.field=value` overrides, nothing else. No torch here.

    name: quickstart
    seed: 0
    stages:
      prepare: {data: helpdesk}
      sft: {model: pretrain, data: prepare}
      sft-small: {stage: sft, model: pretrain, data: prepare}      # a second stage of kind `sft`

A field marked `Reads` names another stage of the experiment, a path, or (for models) a hub id. Before a stage's
`main` runs, the runner replaces it by the path of the artifact, so stages only ever see paths and hub ids.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

STAGES = ("prepare", "pretrain", "sft", "sample", "collect", "rm", "dpo", "ppo", "evaluate", "report")


class UserError(RuntimeError):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


@dataclass(frozen=True)
class Reads:
    """Marks a field as an input, and says which artifact of the named stage's run it is."""

    artifact: str
    every_seed: bool = False
    """With --seeds the stage runs once and gets a list: this artifact of each seed's run."""


@dataclass(frozen=True)
class NotInKey:
    """Marks a setting that cannot change what the stage writes: it is left out of the run key."""


@dataclass(frozen=True)
class KeysOf:
    """Marks a block handed on to a library's dataclass ("trl.SFTConfig"): only its field names are allowed.

    Checked by `check_libraries` before the first stage starts, not at load, since it imports the library.
    """

    target: str


Model = Annotated[str, Reads("model")]
Records = Annotated[str, Reads("records.jsonl")]
Judgements = Annotated[str, Reads("judgements.jsonl")]
Items = Annotated[str, Reads("items.jsonl")]


class StageConfig(BaseModel):
    """Base of all stage settings: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int | None = None
    """None: the experiment's seed (or that of --seeds). Stages that make the world fix theirs."""
    gate: Annotated[Literal["stop", "warn"], NotInKey()] = "stop"
    """What a failed check of the result does: end the run, or mark it and everything built on it."""


@dataclass(frozen=True)
class Experiment:
    """A loaded and validated experiment file: the stages in file order, each name with its kind and settings."""

    name: str
    seed: int
    path: Path
    stages: dict[str, StageConfig]
    kinds: dict[str, str]
