"""Inputs that are no stage of the experiment: a run folder, a file or folder, a hub id."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from stages.config import Reads
from stages.digests import Digests
from stages.errors import UserError
from stages.manifest import FILE, Input, load_manifest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find(place: str, value: str, reads: Reads, digests: Digests, stages: Collection[str]) -> Input:
    """What `value` of the field `place` stands for. UserError if there is nothing, or nothing complete."""
    path = Path(value).expanduser()
    if path.exists():
        run = _run_of(place, path)
        if run == path and reads.artifact:
            path = path / reads.artifact
            if not path.exists():
                raise UserError(f"{place}: the run {value} has no {reads.artifact}")
        return Input(ref=value, path=str(path), digest=digests.of(path), run=str(run) if run else None)
    near = get_close_matches(value, stages, n=1, cutoff=0.7) if reads.artifact else []
    if near:
        raise UserError(
            f"{place}: {value} is no stage of this experiment and no path; did you mean {near[0]}?"
        )
    if reads.artifact == "model" and HUB_ID.fullmatch(value) and Path(value).parts[0] != "runs":
        return Input(ref=value, path=value, digest=f"hub:{value}")
    raise UserError(f"{place}: {value}: no such file or folder (paths start from {Path.cwd()})")


def _run_of(place: str, path: Path) -> Path | None:
    """The run folder that `path` is or lies in."""
    for folder in (path, *path.parents):
        if (folder / FILE).exists():
            status = load_manifest(folder).status
            if status != "complete":
                raise UserError(f"{place}: the run {folder} is {status}; only a complete run can be an input")
            return folder
    return None
