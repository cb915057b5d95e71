"""Where a table row comes from: the runs behind it, and who judged what it learned from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotate.records import Judgement, read
from stages.manifest import FILE, Manifest, load_manifest
from stages.table import Number, RunFacts, Table

JUDGES = {"person": "people", "model": "a model", "simulated": "simulated annotators"}


@dataclass(frozen=True)
class Source:
    """One evaluation: the run that made it, or only a file, of which no more is known than its rows."""

    seed: int
    manifest: Manifest | None = None

    def known(self, name: str) -> Any:
        """What the run recorded under this name."""
        if self.manifest is None:
            return None
        return self.manifest.facts.get(name, self.manifest.metrics.get(name))


def sources(paths: Sequence[str]) -> list[Source]:
    """The evaluation that each records file comes from; files without a run count as seeds 0, 1 ..."""
    found = []
    for index, path in enumerate(paths):
        folder = Path(path).parent
        manifest = load_manifest(folder) if (folder / FILE).exists() else None
        found.append(Source(manifest.seed if manifest else index, manifest))
    return found


def trace(table: Table, evaluations: Sequence[Source]) -> None:
    """Fill in the runs behind every line, who judged, and how well the reward model did on held-out pairs."""
    for line in table.lines:
        runs: dict[str, Manifest] = {}
        for source in evaluations:
            fields = (source.known("made_from") or {}).get(line.policy, [])
            for folder in [source.manifest.inputs[f].run for f in fields] if source.manifest else []:
                if folder is not None:
                    runs |= ancestors(folder)
        line.runs = [short(folder) for folder in runs]
        table.runs |= {short(f): facts(m) for f, m in runs.items() if short(f) not in table.runs}
        judged = {kind for name in line.runs for kind in table.runs[name].judgements}
        line.labels = ", ".join(JUDGES[kind] for kind in sorted(judged))
    for name in ("reward_agreement", "demonstrations"):
        known = [source.known(name) for source in evaluations]
        setattr(table, name, [Number(value=k["value"], low=k["low"], high=k["high"]) for k in known if k])


def ancestors(folder: str) -> dict[str, Manifest]:
    """The run in `folder` and all runs it was built on, youngest first, as far as they are still there."""
    found: dict[str, Manifest] = {}
    waiting = [folder]
    while waiting:
        current = waiting.pop(0)
        if current not in found and (Path(current) / FILE).exists():
            found[current] = load_manifest(current)
            waiting += [given.run for given in found[current].inputs.values() if given.run is not None]
    return found


def judgements(manifest: Manifest) -> Counter[str]:
    """Judgements that this run learned from, by kind of annotator."""
    given = manifest.inputs.get("judgements")
    if given is None or not Path(given.path).exists():
        return Counter()
    return Counter(row.kind for row in read(given.path, Judgement))


def facts(manifest: Manifest) -> RunFacts:
    failed = [f"{name} ({gate.message})" for name, gate in manifest.gates.items() if not gate.passed]
    return RunFacts(
        seed=manifest.seed,
        commit=manifest.code.commit,
        dirty=manifest.code.dirty,
        failed=failed,
        judgements=dict(judgements(manifest)),
    )


def short(folder: str) -> str:
    """`quickstart/sft/0a1b2c3d4e5f`: the same wherever the folder of runs lies."""
    return "/".join(Path(folder).parts[-3:])
