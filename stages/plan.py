"""What an experiment consists of: its runs in order, their keys, and what there is of each already.

A stage's key hashes the content of its inputs, so it is known only once the stages before it are complete;
until then it "waits". With several seeds every stage whose settings or inputs depend on the seed has one run
for each; the others (the world, the base model, the report) have one.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.config import Experiment, InKeyIfSet, NotInKey, StageConfig, module, swap
from stages.digests import Digests
from stages.errors import SettingsError, UserError
from stages.inputs import find
from stages.manifest import FILE, Input, Manifest, load_manifest
from stages.run import is_locked, runs_root

Status = Literal["complete", "running", "interrupted", "failed", "new", "waits", "damaged"]


@dataclass(frozen=True)
class Node:
    stage: str
    seed: int | None
    """None: one run serves all seeds."""


@dataclass(frozen=True)
class State:
    """What there is of one node. `path` is the run to use if complete, else the one to begin or continue."""

    status: Status
    key: str = ""
    path: Path = Path()
    manifest: Manifest | None = None
    inputs: dict[str, Input] = field(default_factory=dict)
    why: str = ""
    """Of "waits" and "damaged": for what, and what of it."""


class Plan:
    """The nodes of an experiment, each after those it reads."""

    def __init__(self, experiment: Experiment, seeds: Sequence[int] = ()):
        self.experiment, self.seeds = experiment, tuple(seeds) or (experiment.seed,)
        self.root = runs_root()
        self.folder = self.root / experiment.name
        self.digests = Digests(self.root / "digests.json")
        self.nodes: list[Node] = []
        self._states: dict[Node, State] = {}
        for seed in self.seeds:
            for stage in experiment.stages:
                self._add(self.node(stage, seed))

    def node(self, stage: str, seed: int | None) -> Node:
        return Node(stage, seed if self._varies(stage) else None)

    def label(self, node: Node) -> str:
        """The stage, and where there are several seeds which."""
        one = node.seed is None or len(self.seeds) == 1
        return node.stage if one else f"{node.stage} (seed {node.seed})"

    def upstream(self, node: Node) -> list[Node]:
        """The nodes that this one reads."""
        seeds = self.seeds if node.seed is None else (node.seed,)
        used = self.experiment.uses(node.stage)
        return list(dict.fromkeys(self.node(stage, seed) for stage in used for seed in seeds))

    def state(self, node: Node) -> State:
        if node not in self._states:
            self._states[node] = self._look(node)
            self.digests.save()
        return self._states[node]

    def refresh(self) -> None:
        """Something has been run: look again."""
        self._states.clear()

    def config(self, node: Node) -> StageConfig:
        """The settings of the node with its seed filled in; inputs still as the file names them."""
        config = self.experiment.stages[node.stage]
        if config.seed is not None:
            return config
        seed = self.experiment.seed if node.seed is None else node.seed
        return config.model_copy(update={"seed": seed})

    def _gathers(self, stage: str) -> bool:
        return any(reads.every_seed for reads in self.experiment.stages[stage].inputs().values())

    def _varies(self, stage: str) -> bool:
        """Whether there is one run for each seed."""
        if self._gathers(stage):
            return False
        fixed = self.experiment.stages[stage].seed is not None
        return not fixed or any(self._varies(used) for used in self.experiment.uses(stage))

    def _add(self, node: Node) -> None:
        if node in self.nodes:
            return
        for used in self.upstream(node):
            self._add(used)
        self.nodes.append(node)

    def _look(self, node: Node) -> State:
        inputs: dict[str, Input] = {}
        waits: list[str] = []
        for dotted, reads, value in self.config(node).references():
            place, name = f"{node.stage}.{dotted}", dotted
            if not (reads.artifact and value in self.experiment.stages):
                if reads.every_seed:
                    name = _next(dotted, inputs)
                inputs[name] = find(place, value, reads, self.digests, self.experiment.stages)
                continue
            seeds = self.seeds if reads.every_seed else (self._one_seed(node, value),)
            of_seeds = dict.fromkeys(self.node(value, seed) for seed in seeds)
            for upstream in of_seeds:
                state = self.state(upstream)
                if state.status != "complete":
                    waits.append(self.lack(upstream))
                    continue
                if reads.every_seed:
                    name = _next(dotted, inputs)
                inputs[name] = artifact(place, value, state, reads.artifact)
        if waits:
            return State("waits", why=", ".join(dict.fromkeys(waits)))
        key = run_key(self.experiment.kinds[node.stage], self.config(node), inputs)
        return self._newest(node, key, inputs)

    def lack(self, node: Node) -> str:
        """How to speak of a node that others wait for."""
        state = self.state(node)
        if state.status == "damaged":
            return f"{self.label(node)}, which is damaged ({state.why}; --force {node.stage} makes it anew)"
        return self.label(node)

    def _one_seed(self, node: Node, used: str) -> int:
        if node.seed is None and len(self.seeds) > 1 and self._varies(used):
            raise SettingsError(
                f"{self.experiment.path}: {node.stage} has one run for all seeds and cannot read {used}, "
                "which has one for each"
            )
        return self.seeds[0] if node.seed is None else node.seed

    def _newest(self, node: Node, key: str, inputs: dict[str, Input]) -> State:
        """The newest complete attempt at this key, or the one to go on with."""
        state = State("new", key, self.folder / node.stage / key[:12], None, inputs)
        for path in attempts(self.folder / node.stage, key):
            if not (path / FILE).exists():  # killed before it had written anything
                manifest, status = None, "new"
            else:
                manifest = load_manifest(path)
                status = manifest.status
            if state.status in ("complete", "damaged") and status != "complete":
                continue
            if status == "running" and not is_locked(path):
                status = "interrupted"
            why = damage(path, manifest) if manifest and status == "complete" else ""
            state = State("damaged" if why else status, key, path, manifest, inputs, why)  # type: ignore[arg-type]
        return state


def _next(dotted: str, inputs: dict[str, Input]) -> str:
    """A place in a list that seeds make longer than the settings say: `evaluations.2`."""
    field = dotted.partition(".")[0]
    return f"{field}.{sum(name.partition('.')[0] == field for name in inputs)}"


def run_key(kind: str, config: StageConfig, inputs: dict[str, Input]) -> str:
    """sha256 of all that decides what a stage writes: kind, version, settings, content of the inputs."""
    digests = {name: item.digest for name, item in inputs.items()}
    settings = resolved(config, digests).model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        unset = getattr(config, name) == info.default
        if any(
            isinstance(mark, NotInKey) or (unset and isinstance(mark, InKeyIfSet)) for mark in info.metadata
        ):
            del settings[name]
    content = {"kind": kind, "version": module(kind).VERSION, "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolved(config: StageConfig, values: dict[str, str]) -> StageConfig:
    """The settings with every input replaced by the given value, by dotted field."""
    update: dict[str, Any] = {}
    for name, reads in config.inputs().items():
        if reads.every_seed:
            update[name] = [value for dotted, value in values.items() if dotted.partition(".")[0] == name]
        else:
            update[name] = swap(name, getattr(config, name), values)
    return config.model_copy(update=update)


def artifact(place: str, ref: str, state: State, name: str) -> Input:
    """The output `name` of a complete run, as an input of the field `place`."""
    assert state.manifest is not None
    written = state.manifest.outputs
    if name not in written:
        raise UserError(f"{place}: {ref} wrote no {name}, only {', '.join(written) or 'nothing'}")
    return Input(ref=ref, path=str(state.path / name), digest=written[name].digest, run=str(state.path))


def attempts(folder: Path, key: str) -> list[Path]:
    """The folders of one key, oldest first: 0a1b…, 0a1b…-2, 0a1b…-3."""
    pattern = re.compile(rf"{key[:12]}(?:-(\d+))?")
    found = [
        (int(match[1] or 1), path)
        for path in folder.glob(f"{key[:12]}*")
        if (match := pattern.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def damage(path: Path, manifest: Manifest) -> str:
    """What is missing or of another size in a complete run; empty if nothing is."""
    for output in manifest.outputs.values():
        for name, size in output.files.items():
            file = path / name
            if not file.exists():
                return f"{file} is missing"
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes, not {size} as when it was written"
    return ""
