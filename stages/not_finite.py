"""Losses that are not finite numbers: whose they are, and the steps that changed nothing because of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward.parallel import summed
from reward.together import parts
from stages.config import UserError
from stages.run import Run


@torch.no_grad()
def not_finite(objective: Any, model: Any, examples: Sequence[Any]) -> list[str]:
    """What those are called whose loss, each by itself, is not a finite number."""
    bad = [e for e in parts(examples) if not torch.isfinite(objective.loss(model, [e])[0])]
    return [getattr(example, "task", "") or "without a name" for example in bad]


def of_tasks(bad: Mapping[str, float]) -> str:
    """The first of them, to be put into a line."""
    named = ", ".join(list(bad)[:5]) + ", ..." * (len(bad) > 5)
    return f" (the loss is not finite of {named})" if bad else ""


def report_skipped(state: Any, bad: Mapping[str, float], since_logged: float, run: Run) -> None:
    """Record and say which steps of a training were skipped; UserError where that is all of them.

    `bad`: how often the loss of each task was not finite. `since_logged`: steps skipped since `state`, the
    Trainer's, last logged.
    """
    of_all = summed(bad)
    if of_all:
        run.record(not_finite_loss={task: int(count) for task, count in of_all.items()})
    skipped = int(sum(line.get("skipped_steps", 0) for line in state.log_history) + since_logged)
    if not skipped:
        return
    run.record(skipped_steps=skipped)
    line = f"{skipped} of {state.global_step} steps had no finite gradient{of_tasks(of_all)}"
    if skipped >= state.global_step:
        raise UserError(f"{line}: nothing was trained")
    run.say(f"{line}: they changed nothing")
