"""A run: the folder of one execution of one stage, and the record of where it came from.

    runs/quickstart/sft/0a1b2c3d4e5f/
        manifest.json   status, settings, code, inputs, outputs, final metrics (stages/manifest.py)
        metrics.jsonl   one line for each call of `Run.log`
        model/          whatever the stage writes

Only a run whose status is "complete" can be the input of another. A run that was killed is continued in its
folder. Under torchrun one process keeps the record, and what the others write goes to a scratch folder.
"""

import errno
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from annotate.records import DataError
from stages.digests import Digests, sizes
from stages.errors import UserError
from stages.manifest import (
    Gate,
    Input,
    Manifest,
    Output,
    code,
    hardware,
    load_manifest,
    now,
    packages,
    replace,
)
from stages.progress import Bar, Screen

__all__ = ["Input", "Manifest", "Run", "is_writer", "load_manifest", "locked", "runs_root"]

LOCK = ".lock"
NO_SPACE = ("No space left on device", "os error 28", "disk is full")


def runs_root() -> Path:
    return Path(os.environ.get("PREFLOOP_RUNS", "runs"))


def is_writer() -> bool:
    """False in the processes of torchrun that only help."""
    return os.environ.get("RANK", "0") == "0"


class Run:
    """What a stage's `main` writes to. `inputs` holds what was resolved, by dotted field of the settings."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        gate: str = "stop",
        screen: Screen | None = None,
        label: str | None = None,
    ):
        """`label`: how to speak of the stage; its name where there is only one of it."""
        self.path, self.manifest = path, manifest
        self.experiment, self.stage, self.seed = manifest.experiment, manifest.stage, manifest.seed
        self.label = label or self.stage
        self.inputs = manifest.inputs
        self.screen = screen or Screen(quiet=not is_writer())
        self._gate = gate
        self._outputs: list[str] = []
        self._scratch: Path | None = None
        self._logged = False
        path.mkdir(parents=True, exist_ok=True)

    def output(self, name: str) -> Path:
        """Path in the run folder for something this stage writes; its digest is recorded at the end."""
        if is_writer():
            folder = self.path
            if name not in self._outputs:
                self._outputs.append(name)
        else:
            self._scratch = self._scratch or Path(tempfile.mkdtemp(prefix="prefloop-"))
            folder = self._scratch
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, step: int | None = None, **metrics: float) -> None:
        """Append a line to metrics.jsonl."""
        if step is not None and not self._logged:
            self._rewind(step)
        line = ({} if step is None else {"step": step}) | {k: _plain(v) for k, v in metrics.items()}
        if is_writer():
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def record(self, **facts: Any) -> None:
        """Into the manifest: numbers become its metrics, all else its facts."""
        for name, value in facts.items():
            plain = _plain(value)
            if isinstance(plain, int | float) and not isinstance(plain, bool):
                self.manifest.metrics[name] = plain
            else:
                self.manifest.facts[name] = plain

    def gate(self, name: str, passed: bool, message: str) -> None:
        """Record a check of the result. UserError if it failed and the stage's `gate` setting is "stop"."""
        self.manifest.gates[name] = Gate(passed=bool(passed), message=message)
        if not passed and self._gate == "stop":
            raise UserError(f"check failed: {name}: {message} ({self.stage}.gate=warn goes on all the same)")
        if not passed:
            self.say(f"warning: check failed: {name}: {message}")

    def say(self, text: str) -> None:
        """One line for the user."""
        self.screen.say(f"{self.label}: {text}")

    def progress(self, description: str, total: int | None = None, unit: str = "steps") -> Bar:
        """A context manager: `with run.progress("sampling", total=9) as bar: bar.advance(1, loss=0.5)`."""
        return Bar(self.screen, self.label, description, total, unit)

    def _rewind(self, step: int) -> None:
        """Forget what a killed attempt logged beyond the checkpoint that this one continues from."""
        self._logged, path = True, self.path / "metrics.jsonl"
        if is_writer() and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            replace(path, "".join(line for line in whole if json.loads(line).get("step", -1) < step))

    @contextmanager
    def recorded(self) -> Iterator["Run"]:
        """While the block runs the manifest says "running"; leaving it settles the status, whatever happens.

        Every error leaves as UserError or KeyboardInterrupt, with a message fit for the user.
        """
        began, spent = time.monotonic(), self.manifest.wall_seconds
        self._start()
        try:
            yield self
            self._finish(spent + time.monotonic() - began)
        except BaseException as error:
            self.manifest.wall_seconds = spent + time.monotonic() - began
            with suppress(OSError):  # disk full: a run that says "running" and has no owner counts as killed
                self._settle(error)
            if not isinstance(error, Exception):
                raise
            raise self._explained(error) from error
        finally:
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self) -> None:
        self.manifest.status, self.manifest.error, self.manifest.started = "running", None, now()
        self.manifest.code, self.manifest.packages, self.manifest.hardware = code(), packages(), hardware()
        self.manifest.process = f"{socket.gethostname()}:{os.getpid()}"
        with suppress(OSError):  # forget the peak of the stage before; not every container allows it
            Path("/proc/self/clear_refs").write_text("5")
        self._save()

    def _finish(self, wall: float) -> None:
        if not is_writer():
            return self._await_writer()
        digests = Digests()
        for name in self._outputs:
            if not (self.path / name).exists():
                raise UserError(f"did not write {name}, which it announced")
            self.manifest.outputs[name] = Output(
                digest=digests.of(self.path / name), files=sizes(self.path, name)
            )
        self._measure()
        self.manifest.status, self.manifest.wall_seconds = "complete", wall
        self._save()

    def _await_writer(self) -> None:
        """What this stage wrote can be read once the writing process says so."""
        while (status := load_manifest(self.path).status) == "running":
            time.sleep(0.2)
        if status != "complete":
            raise UserError(f"the process of rank 0 ended {status}")

    def _settle(self, error: BaseException) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        self.manifest.status = "interrupted" if stopped else "failed"
        self.manifest.error = None if stopped else _first_line(error)
        self._measure()
        self._save()

    def _measure(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.manifest.peak_memory_bytes = peak * (1 if sys.platform == "darwin" else 1024)
        self.manifest.finished = now()
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            self.manifest.hardware["gpu"] = torch.cuda.get_device_name()

    def _explained(self, error: Exception) -> UserError:
        if _no_space(error, self.path):
            return UserError(
                f"{self.path}: no space left on the disk: free some, then run the same command again"
            )
        if isinstance(error, UserError | DataError):
            return UserError(f"{self.label}: {error}")
        report = self.path / ("traceback.txt" if is_writer() else f"traceback-{os.environ['RANK']}.txt")
        with suppress(OSError):
            report.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return UserError(f"{self.label} failed: {_first_line(error)} (the whole story: {report})")

    def _save(self) -> None:
        if is_writer():
            self.manifest.save(self.path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Own a run folder. UserError at once if another process does."""
    if not is_writer():
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, timeout=0.5)  # `prefloop status` may be looking
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{path}: another prefloop is at work on it: wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    try:
        with locked(path):
            return False
    except UserError:
        return True


def _plain(value: Any) -> Any:
    """As JSON holds it: numbers of numpy and torch become Python's, tuples lists, paths text."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item") and callable(value.item):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, UserError | DataError) else f"{type(error).__name__}: "
    return name + (text if len(text) < 400 else text[:400] + " ...")


def _no_space(error: BaseException | None, folder: Path) -> bool:
    """Libraries report a full disk in their own words (safetensors, SQLite, torch), or in none at all."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    with suppress(OSError):
        return shutil.disk_usage(folder).free < 1 << 16
    return False
