"""Settings: one experiment file, `stage.field=value` overrides, nothing else. No torch here.

    name: quickstart
    seed: 0
    stages:
      prepare: {data: helpdesk}
      sft: {model: pretrain, data: prepare}
      sft-small: {stage: sft, model: pretrain, data: prepare}      # a second stage of kind `sft`

Stages that differ in little can share the rest by YAML's own `&name` and `<<: *name`.

A field marked `Reads` names another stage of the experiment, a path, or (for models) a hub id. Before a
stage's `main` runs, the runner replaces it by the path of the artifact: stages only see paths and hub ids.
"""

import copy
import importlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from stages.adapters import configuration
from stages.errors import SettingsError, suggest
from stages.errors import UserError as UserError  # stages take it from here
from stages.libraries import check_block
from stages.yamlfile import NAME, mapping, only_known, override, read

STAGES = (
    "prepare", "pretrain", "sft", "sample", "collect",
    "rm", "dpo", "kto", "ppo", "rloo", "grpo",
    "evaluate", "report",
)  # fmt: skip


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
class InKeyIfSet:
    """Marks a setting that came later than others: at its default it is left out of the run key.

    So the runs from before it keep theirs. The default must leave the outputs as they were.
    """


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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seed: int | None = None
    """None: the experiment's seed (or that of --seeds). Stages that make the world fix theirs."""
    gate: Annotated[Literal["stop", "warn"], NotInKey()] = "stop"
    """What a failed check of the result does: end the run, or mark it and everything built on it."""

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, settings: Any) -> Any:
        """`evaluations: evaluate` says one name; with several seeds it stands for several runs."""
        if isinstance(settings, dict):
            for name, reads in cls.inputs().items():
                if reads.every_seed and isinstance(settings.get(name), str):
                    settings = settings | {name: [settings[name]]}
        return settings

    @classmethod
    def inputs(cls) -> dict[str, Reads]:
        """The fields marked with `Reads`, at the top or inside a list, dict or union."""
        marked = {name: _marks(field, Reads) for name, field in cls.model_fields.items()}
        return {name: found[0] for name, found in marked.items() if found}

    @classmethod
    def blocks(cls) -> dict[str, KeysOf]:
        """The fields whose content a library checks."""
        marked = {name: _marks(field, KeysOf) for name, field in cls.model_fields.items()}
        return {name: found[0] for name, found in marked.items() if found}

    def references(self) -> Iterator[tuple[str, Reads, str]]:
        """(dotted field, mark, value) of every input that is set: `policies.sft`, `texts.0`, `model`."""
        for name, reads in self.inputs().items():
            keywords = _literals(type(self).model_fields[name].annotation)
            for path, value in _strings(name, getattr(self, name)):
                if value not in keywords:
                    yield path, reads, value


@dataclass(frozen=True)
class Experiment:
    """A loaded and validated experiment file: the stages in file order, each with its kind and settings."""

    name: str
    seed: int
    path: Path
    stages: dict[str, StageConfig]
    kinds: dict[str, str]
    overrides: Sequence[str] = ()

    @property
    def command(self) -> str:
        """What the user types to run it."""
        return shlex.join(["prefloop", "run", str(self.path), *self.overrides])

    def uses(self, stage: str) -> list[str]:
        """The stages of this experiment that `stage` reads."""
        found = [value for _, reads, value in self.stages[stage].references() if reads.artifact]
        return [name for name in dict.fromkeys(found) if name in self.stages]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, apply `stage.field=value` overrides, validate every stage's settings.

    Raises SettingsError with the file, the dotted field and, where there is one, the close match.
    """
    path = Path(path)
    raw = mapping(path, "", read(path))
    only_known(path, "", raw, ("name", "seed", "stages"))
    name, seed = raw.get("name"), raw.get("seed", 0)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SettingsError(f"{path}: name: needs a word that can name a folder, such as quickstart")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise SettingsError(f"{path}: seed: needs a whole number from 0 on, not {seed!r}")
    settings = {
        stage: copy.deepcopy(mapping(path, f"stages.{stage}", value or {}))  # an alias shares its blocks
        for stage, value in mapping(path, "stages", raw.get("stages")).items()
    }
    if not settings:
        raise SettingsError(f"{path}: stages: the experiment has no stage")
    changed = {override(settings, text) for text in overrides}

    experiment = Experiment(name, seed, path, {}, {}, tuple(overrides))
    for stage, values in settings.items():
        kind = experiment.kinds[stage] = _kind(path, stage, values.pop("stage", stage))
        experiment.stages[stage] = _validate(path, stage, module(kind).Config, values, changed)
    _check_cycles(experiment)
    return experiment


def check_libraries(experiment: Experiment, stages: Iterable[str] | None = None) -> None:
    """Have the libraries look at the blocks meant for them. Imports them: some seconds."""
    for stage in experiment.stages if stages is None else stages:
        config = experiment.stages[stage]
        for field, block in config.blocks().items():
            if given := getattr(config, field):
                check_block(f"{experiment.path}: {stage}.{field}", block.target, given)
        if given := getattr(config, "peft", None):
            configuration(given, f"{experiment.path}: {stage}.peft")


def module(kind: str) -> ModuleType:
    """The module of a kind of stage: its `VERSION`, `Config` and `main`."""
    return importlib.import_module(f"stages.{kind}")


def swap(path: str, value: Any, new: Mapping[str, str]) -> Any:
    """`value` of the field `path`, its strings replaced by what `new` has for them by dotted field."""
    if isinstance(value, str):
        return new.get(path, value)
    if isinstance(value, list):
        return [swap(f"{path}.{index}", inner, new) for index, inner in enumerate(value)]
    if isinstance(value, dict):
        return {key: swap(f"{path}.{key}", inner, new) for key, inner in value.items()}
    return value


def _kind(path: Path, stage: str, kind: Any) -> str:
    if kind in STAGES:
        return str(kind)
    own = "" if kind != stage else " (a stage with a name of its own says `stage: KIND`)"
    raise SettingsError(f"{path}: stages.{stage}: unknown stage {kind}; {suggest(str(kind), STAGES)}{own}")


def _validate(
    path: Path, stage: str, config: type[StageConfig], values: dict[str, Any], changed: set[str]
) -> StageConfig:
    try:
        return config.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        loc = _own_part(first["loc"], values)
        field = ".".join([stage, *map(str, loc)])
        if first["type"] == "extra_forbidden":
            problem = f"unknown setting; {suggest(str(loc[-1]), _block(config, loc[:-1]).model_fields)}"
        elif first["type"] == "missing":
            problem = "is missing and has no default"
            field = ".".join([stage, *map(str, first["loc"])])
        else:  # one message for each side of a union
            reasons = dict.fromkeys(e["msg"] for e in found if _own_part(e["loc"], values) == loc)
            problem = " or ".join(reason.removeprefix("Value error, ") for reason in reasons)
            problem = problem.replace(" or Input should be", " or") + f", not {first['input']!r}" * bool(loc)
        where = "command line" if any(f"{field}.".startswith(f"{c}.") for c in changed) else str(path)
        raise SettingsError(f"{where}: {field}: {' '.join(problem.split())}") from None


def _block(config: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel]:
    """The model of the settings at `loc`: the stage's own, or that of a block in it."""
    for name in loc:
        annotation = config.model_fields[str(name)].annotation
        inner = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        config = inner[0] if inner else config
    return config


def _own_part(loc: Sequence[str | int], values: Any) -> tuple[str | int, ...]:
    """`loc` without the names that pydantic gives to the sides of a union."""
    own: list[str | int] = []
    for part in loc:
        if isinstance(values, dict) and (part in values or not own):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        else:
            break
        own.append(part)
    return tuple(own)


def _check_cycles(experiment: Experiment) -> None:
    done: set[str] = set()

    def visit(stage: str, chain: tuple[str, ...]) -> None:
        if stage in chain:
            circle = " -> ".join([*chain[chain.index(stage) :], stage])
            raise SettingsError(f"{experiment.path}: stages read one another in a circle: {circle}")
        if stage not in done:
            for used in experiment.uses(stage):
                visit(used, (*chain, stage))
            done.add(stage)

    for stage in experiment.stages:
        visit(stage, ())


def _marks(field: Any, kind: type[Any]) -> list[Any]:
    """The marks of this kind on a field, or anywhere inside its type."""
    if hasattr(field, "metadata"):
        found = [mark for mark in field.metadata if isinstance(mark, kind)]
        return found or _marks(field.annotation, kind)
    found = [mark for mark in getattr(field, "__metadata__", ()) if isinstance(mark, kind)]
    return found + [mark for inner in get_args(field) for mark in _marks(inner, kind)]


def _literals(annotation: Any) -> set[Any]:
    if getattr(annotation, "__origin__", None) is Literal:
        return set(get_args(annotation))
    return {value for inner in get_args(annotation) for value in _literals(inner)}


def _strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(f"{path}.{index}", inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(f"{path}.{key}", inner)
