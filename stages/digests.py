"""Content digests of files and folders, remembered by path, size and time of change.

What a stage wrote is digested once, at its end. What comes from elsewhere (a data file, a base model of some
gigabytes) would have to be read at every `prefloop status`; `digests.json` in the folder of runs spares that.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from stages.errors import UserError

SETTLED = 2.0
"""Seconds after its last change from which on a file's time is trusted to tell the next one."""


class Digests:
    def __init__(self, store: Path | None = None):
        """`store`: the file to remember digests in; None reads everything."""
        self.store = store
        self.known: dict[str, list[int | str]] = {}
        self.changed = False
        if store is not None:
            try:
                self.known = json.loads(store.read_text())
            except (OSError, ValueError):  # a cache: without it we read the files again
                self.known = {}

    def of(self, path: Path) -> str:
        """sha256 of a file, or of a folder's relative paths and files. UserError where there is neither."""
        if path.is_dir():
            lines = [f"{file.relative_to(path).as_posix()}\0{self._file(file)}" for file in files(path)]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return self._file(path)

    def save(self) -> None:
        if self.store is None or not self.changed:
            return
        from stages.manifest import replace

        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            replace(self.store, json.dumps(self.known, indent=0, sort_keys=True))
        except OSError:  # a read-only or full disk: only speed is lost
            return
        self.changed = False

    def _file(self, path: Path) -> str:
        try:
            stat = path.stat()
            name, fingerprint = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
            if (known := self.known.get(name)) and known[:2] == fingerprint:
                return str(known[2])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if self.store is not None and stat.st_mtime < time.time() - SETTLED:
            self.known[name] = [*fingerprint, digest]
            self.changed = True
        return digest


def files(folder: Path) -> list[Path]:
    """All files below a folder, in an order that depends on their names alone."""
    found = [Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def sizes(run: Path, name: str) -> dict[str, int]:
    """Size of every file of the output `name` of a run, by its path in the run folder."""
    path = run / name
    found = files(path) if path.is_dir() else [path]
    return {file.relative_to(run).as_posix(): file.stat().st_size for file in found}
