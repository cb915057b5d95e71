"""What there is of an experiment: the table of `prefloop status`, and what `prefloop clean` may remove."""

from datetime import datetime
from pathlib import Path

from stages.config import Experiment
from stages.errors import UserError
from stages.manifest import FILE, Manifest, code, load_manifest
from stages.plan import Plan, State
from stages.progress import clock
from stages.run import is_locked, runs_root

MAIN = ("accuracy", "held_out_accuracy", "reward", "self_stopping", "items", "labels", "records", "loss")
"""What says most of a stage, best first."""


def main_metric(manifest: Manifest) -> str:
    """`accuracy 0.83`, or nothing."""
    of_policies = [name for name in manifest.metrics if name.startswith("gold/")]
    names = [*MAIN, *reversed(of_policies), *manifest.metrics]
    name = next((name for name in names if name in manifest.metrics), None)
    return f"{name} {manifest.metrics[name]:.4g}" if name else ""


def show(plan: Plan) -> None:
    """Print one line for each run of the plan."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    for head in ("stage", "state", "key", "when", "took", "checks", "result"):
        table.add_column(head, justify="right" if head == "took" else "left", no_wrap=head != "state")
    states = {node: plan.state(node) for node in plan.nodes}
    for node, state in states.items():
        table.add_row(*_cells(plan.label(node), state), style="" if state.status == "complete" else "yellow")
    console.print(table, markup=False)
    done = sum(state.status == "complete" for state in states.values())
    console.print(f"{done} of {len(states)} complete, in {plan.folder}", markup=False)
    for line in _other_commits({plan.label(node): state for node, state in states.items()}):
        console.print(line, markup=False)


def _cells(name: str, state: State) -> list[str]:
    from rich.markup import escape

    manifest = state.manifest
    text: dict[str, str] = {
        "waits": f"waits for {state.why}",
        "damaged": f"damaged: {state.why}; --force makes it anew",
        "interrupted": "interrupted; `prefloop run` continues it",
        "new": "to be run",
    }
    if manifest is None:
        return [escape(cell) for cell in (name, text[state.status], state.path.name, "", "", "", "")]
    failed = [name for name, gate in manifest.gates.items() if not gate.passed]
    checks = f"failed: {', '.join(failed)}" if failed else "passed" * bool(manifest.gates)
    cells = [
        name,
        text.get(state.status, state.status) + (f": {manifest.error}" if state.status == "failed" else ""),
        state.path.name,
        _when(manifest.finished or manifest.started),
        clock(manifest.wall_seconds),
        checks,
        main_metric(manifest) if state.status == "complete" else "",
    ]
    return [escape(cell) for cell in cells]


def _when(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else ""


def _other_commits(states: dict[str, State]) -> list[str]:
    """Not a reason to run again (that is what a stage's VERSION is for), but something to know."""
    made_by: dict[str, list[str]] = {}
    for name, state in states.items():
        commit = state.manifest.code.commit if state.manifest and state.status == "complete" else None
        if commit and commit != code().commit:
            made_by.setdefault(commit[:8], []).append(name)
    return [
        f"made by commit {commit}, not the one checked out: {', '.join(n)}" for commit, n in made_by.items()
    ]


def unreferenced(experiment: Experiment, seeds: tuple[int, ...] = ()) -> dict[Path, str]:
    """Run folders of the experiment that its present settings do not lead to -> why they must stay, or "".

    All seeds count of which there are runs.
    """
    folder = runs_root() / experiment.name
    manifests = {path.parent: load_manifest(path.parent) for path in sorted(folder.glob(f"*/*/{FILE}"))}
    known = {manifest.seed for manifest in manifests.values() if manifest.experiment == experiment.name}
    used: set[Path] = set()
    for seed in {experiment.seed, *seeds, *known}:
        plan = Plan(experiment, [seed])
        used |= {plan.state(node).path for node in plan.nodes}
    written = {o.digest for path, m in manifests.items() if path in used for o in m.outputs.values()}
    for path, manifest in manifests.items():  # a report over several seeds
        stage = experiment.stages.get(manifest.stage)
        gathers = stage is not None and any(reads.every_seed for reads in stage.inputs().values())
        if gathers and all(given.digest in written for given in manifest.inputs.values()):
            used.add(path)
    left = [path for path in manifests if path not in used]
    return {path: _why_it_stays(path, left) for path in left}


def _why_it_stays(path: Path, leaving: list[Path]) -> str:
    if is_locked(path):
        return "is being written"
    for other in sorted(runs_root().glob(f"*/*/*/{FILE}")):
        if other.parent not in leaving:
            try:
                inputs = load_manifest(other.parent).inputs.values()
            except UserError:  # of another version: it cannot say what it reads
                continue
            if any(given.run and Path(given.run).resolve() == path.resolve() for given in inputs):
                return f"is read by {other.parent}"
    return ""


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


def human(count: float) -> str:
    """`1.4 MB`"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
