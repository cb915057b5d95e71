"""The reference's log-probabilities, kept by content beside the runs: a sweep computes them once.

    runs/.reference/<key>.npy    one float64 for each completion, in order

The key is a digest of the policy's content, of all token ids, and of what else moves the last digits. A file
that is not there, not readable or of another length is computed; deleting the folder costs only time.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy
import torch

from reward.batch import Example
from reward.parallel import once
from reward.paths import choose
from reward.together import each_once
from reward.tokens import device_of, logprobs
from stages.config import UserError
from stages.run import Run, is_writer, runs_root

LAYOUT = 2
"""Of the rows that completions are computed in: another one moves the last digits."""


def reference_logps(
    model: Any, policy: str, examples: Sequence[Example], tasks: Sequence[str], run: Run
) -> list[tuple[float, ...]]:
    """Per example the log-probability of each completion under `model`, whose content digest is `policy`.

    UserError where one is not a finite number, with its task.
    """
    sizes = [len(example.completions) for example in examples]
    path = runs_root() / ".reference" / f"{_key(model, policy, examples)}.npy"
    cached = not policy.startswith("hub:")  # the content behind a hub id is not known
    values = once(lambda: _load(path, sum(sizes))) if cached else None
    if values is None:
        with run.progress("reference log-probabilities", total=1, unit="passes") as bar:
            found = each_once(examples, lambda distinct: _logps(model, distinct))
            values = numpy.array([value for of_example in found for value in of_example])
            bar.advance(1)
        before = run.manifest.metrics.get("reference_computed", 0)
        run.record(reference_computed=before + len(values))
        if cached and is_writer() and numpy.isfinite(values).all():
            _store(path, values)
    ends = numpy.cumsum(sizes)
    of_examples = [tuple(part.tolist()) for part in numpy.split(values, ends[:-1])]
    for task, logps in zip(tasks, of_examples, strict=True):
        if not numpy.isfinite(logps).all():
            raise UserError(f"task {task}: its replies have log-probabilities {logps} under the reference")
    return of_examples


def _logps(model: Any, examples: Sequence[Example]) -> list[list[float]]:
    choose(model, examples)
    return [[sum(tokens) for tokens in rows] for rows in logprobs(model, examples)]


def _key(model: Any, policy: str, examples: Sequence[Example]) -> str:
    rows = [(example.prompt, example.completions) for example in examples]
    content = [LAYOUT, policy, rows, device_of(model).type, torch.__version__]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _load(path: Any, count: int) -> Any:
    try:
        values = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = values.shape == (count,) and values.dtype == numpy.float64 and numpy.isfinite(values).all()
    return values if whole else None


def _store(path: Any, values: Any) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    buffer = BytesIO()
    numpy.save(buffer, values)
    with suppress(OSError):  # a read-only or full disk: only time is lost
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(buffer.getvalue())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
