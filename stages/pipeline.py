"""Runs what an experiment lacks: stage after stage, in this process, each in its own locked folder."""

import gc
import logging
import os
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.config import StageConfig, check_libraries, module
from stages.errors import SettingsError, UserError, suggest
from stages.manifest import FILE, Manifest, load_manifest
from stages.overview import main_metric
from stages.plan import Node, Plan, State, attempts, resolved
from stages.progress import Screen, clock
from stages.run import Run, is_writer, locked


def run(
    plan: Plan,
    screen: Screen,
    *,
    only: Collection[str] = (),
    force: Collection[str] = (),
    command: str = "",
) -> None:
    """Run what is not complete, in order. `only` these stages; `force`: make these anew, in new folders."""
    for stage in [*only, *force]:
        if stage not in plan.experiment.stages:
            raise SettingsError(
                f"{plan.experiment.path}: the experiment has no stage {stage}; "
                f"{suggest(stage, plan.experiment.stages)}"
            )
    nodes = [node for node in plan.nodes if not only or node.stage in only]
    todo = [node for node in nodes if node.stage in force or plan.state(node).status != "complete"]
    _check_reachable(plan, todo, force)
    if len(nodes) > len(todo):
        screen.say(f"{len(nodes) - len(todo)} of {len(nodes)} stages are complete")
    _in_step()
    with screen.live(), _seldom_collected():
        screen.stages(0, len(todo), "checking settings")  # imports torch: some seconds
        check_libraries(plan.experiment, dict.fromkeys(node.stage for node in todo))
        for done, node in enumerate(todo):
            forced = node.stage in force
            state = plan.state(node)
            if state.status == "complete" and not forced:
                screen.say(f"{plan.label(node)}: complete, its inputs have not changed")
                continue
            screen.stages(done, len(todo), plan.label(node))
            _execute(plan, node, state, screen, forced, command)
            plan.refresh()
        screen.stages(len(todo), len(todo), None)


def _check_reachable(plan: Plan, todo: Sequence[Node], force: Collection[str]) -> None:
    """Whatever a stage waits for is complete or to be run, and nothing damaged is in the way."""
    for node in todo:
        state = plan.state(node)
        if state.status == "damaged" and node.stage not in force:
            raise UserError(f"{plan.label(node)}: {state.why}; make it anew with --force {node.stage}")
        lacking = [used for used in plan.upstream(node) if used not in todo]
        if lack := [plan.lack(used) for used in lacking if plan.state(used).status != "complete"]:
            raise UserError(
                f"{plan.label(node)} waits for {', '.join(lack)}: run `{plan.experiment.command}`"
            )


def _execute(plan: Plan, node: Node, state: State, screen: Screen, forced: bool, command: str) -> None:
    """One stage, in its folder, under its lock."""
    path = _fresh(plan, node, state) if forced else state.path
    with locked(path):
        before = load_manifest(path) if (path / FILE).exists() else None
        if before is not None and before.status == "complete" and is_writer():
            return  # another process has done it in the meantime
        config = plan.config(node)
        kind = plan.experiment.kinds[node.stage]
        manifest = Manifest(
            experiment=plan.experiment.name,
            stage=node.stage,
            kind=kind,
            stage_version=module(kind).VERSION,
            seed=config.seed or 0,
            key=state.key,
            settings=config.model_dump(mode="json"),
            inputs=state.inputs,
            wall_seconds=before.wall_seconds if before else 0.0,
            command=command,
        )
        one = Run(path, manifest, config.gate, screen, plan.label(node))
        screen.say(f"{plan.label(node)}: {'continuing' if before else 'started'} in {path}")
        with one.recorded():
            _in_step()  # the others may read that it is running
            seed_everything(manifest.seed, _uses_torch(config))
            if is_writer() or _uses_torch(config):  # else there is nothing to share
                module(kind).main(resolved(config, {name: i.path for name, i in state.inputs.items()}), one)
        result = main_metric(manifest)
        screen.say(
            f"{plan.label(node)}: complete in {clock(manifest.wall_seconds)}{result and ', ' + result}"
        )
    _tidy()


def _in_step() -> None:
    """Under torchrun, until its other processes have come as far."""
    if "RANK" in os.environ:
        from reward.parallel import join, wait

        join()
        wait()


def _fresh(plan: Plan, node: Node, state: State) -> Path:
    """The folder of a forced attempt: a new one, or the newest if that was never finished."""
    folder = plan.folder / node.stage
    found = attempts(folder, state.key)
    if not found:
        return folder / state.key[:12]
    newest = found[-1]
    if not (newest / FILE).exists() or load_manifest(newest).status != "complete":
        return newest
    number = int(newest.name.partition("-")[2] or 1) + 1
    return folder / f"{state.key[:12]}-{number}"


def _uses_torch(config: StageConfig) -> bool:
    return bool(config.blocks()) or any(reads.artifact == "model" for reads in config.inputs().values())


def seed_everything(seed: int, with_torch: bool) -> None:
    """So that what a stage draws depends on its seed, not on the stages run before it in this process."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if with_torch:
        import torch

        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # costs time and changes no result of ours
        _hide_bars()


def _hide_bars() -> None:
    """Of transformers, for the loading of every model: ours is there. Those of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
    # Of checkpoints whose files are equally old: they are then ordered by number, which is right.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look less often for cycles among what has lived long: rows of data hold none.

    Looking through all of them again and again took a seventh of collect. New objects are looked at as often
    as ever, and between stages (`_tidy`) all that came since the stage before.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _tidy() -> None:
    """Memory of one stage is free before the next."""
    gc.collect()
    gc.freeze()  # what is left are libraries, some hundred thousand objects not worth looking at again
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
