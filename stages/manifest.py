"""The record of a run, `manifest.json`: what was executed with what, where it came from, what came of it.

Replaced atomically, so that it is either the old or the new one, never a torn one.
"""

import functools
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.errors import UserError

FILE = "manifest.json"
PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("numpy", "scipy", "scikit-learn", "pandas", "pydantic", "SQLAlchemy"),
)

Status = Literal["running", "complete", "failed", "interrupted"]


class Part(BaseModel):
    """Base of everything in a manifest."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Input(Part):
    ref: str
    """As the experiment file says it: a stage, a path or a hub id."""
    path: str
    """What the stage was given: the path of the artifact, or the hub id."""
    digest: str
    """Of the content; for a hub id, whose content is not known beforehand, "hub:" and the id."""
    run: str | None = None
    """Folder of the run that wrote it; None for what comes from elsewhere."""


class Output(Part):
    digest: str
    files: dict[str, int]
    """Size in bytes of every file, by its path in the run folder."""


class Gate(Part):
    passed: bool
    message: str


class Code(Part):
    commit: str | None = None
    """None: not a git checkout."""
    dirty: bool | None = None
    """There were uncommitted changes."""


class Manifest(Part):
    version: Literal[1] = 1
    experiment: str
    stage: str
    kind: str
    stage_version: int = 1
    seed: int = 0
    key: str = ""
    """sha256 of kind, version, settings, seed and the content of the inputs."""
    status: Status = "running"
    error: str | None = None
    settings: dict[str, Any] = {}
    inputs: dict[str, Input] = {}
    """By dotted field: `model`, `policies.sft`, `evaluations.0`."""
    outputs: dict[str, Output] = {}
    metrics: dict[str, int | float] = {}
    facts: dict[str, Any] = {}
    gates: dict[str, Gate] = {}
    started: datetime | None = None
    finished: datetime | None = None
    wall_seconds: float = 0.0
    """Over all attempts in this folder."""
    peak_memory_bytes: int | None = None
    """Largest resident size of the process during this stage."""
    command: str = ""
    code: Code = Code()
    packages: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    process: str = ""
    """host:pid of the writer."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / FILE, self.model_dump_json(indent=2) + "\n")


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a run folder. UserError where there is none or it is not one of ours."""
    path = Path(folder) / FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no {FILE}") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: no manifest of this version ({error.errors()[0]['msg']}): move its folder away"
        ) from None


def replace(path: Path, text: str) -> None:
    """Put `text` in place of the file's content, durably, or leave it as it was."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def now() -> datetime:
    return datetime.now(UTC)


@functools.cache
def code() -> Code:
    """Commit of the checkout that this package lies in."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return Code(commit=commit, dirty=None if changes is None else bool(changes))


@functools.cache
def packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU, cores that we may use, memory. The GPU is added at the end: by then torch is loaded, if at all."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": cores, "memory_bytes": memory, "system": platform.platform()}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
