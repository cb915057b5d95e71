"""Report: the result table with intervals, two plots, samples, and where every row comes from.

    prefloop report configs/quickstart.yaml

Reads    evaluations       evaluation rows, of every seed
         training          PPO's samples with their true score, of every seed
Writes   README.md         the page to read
         table.csv, .json  the numbers; the CSV holds no time, date or path, so equal results give equal bytes
         *.png             gold and proxy reward over PPO steps; reward against KL
         records.jsonl.gz  every evaluated reply of every seed

`prefloop run CONFIG --publish` copies the folder to results/<experiment>/ once the run is complete.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

from annotate.records import read, write
from stages.config import Reads, StageConfig, UserError
from stages.table import HEALTH, QUALITY, Table, grid, load, marks, to_csv

if TYPE_CHECKING:
    from stages.plots import Sampled
    from stages.run import Run
    from stages.tabulate import Scored

VERSION = 1
RESULTS = Path("results")
FILES = ("README.md", "table.csv", "table.json", "records.jsonl.gz")
INDEX = "<!-- experiments: written by `prefloop run CONFIG --publish` -->"


class Config(StageConfig):
    evaluations: Annotated[list[str], Reads("records.jsonl", every_seed=True)]
    training: Annotated[list[str], Reads("training.jsonl", every_seed=True)] = []


def main(config: Config, run: "Run") -> None:
    from stages import lineage, plots
    from stages.page import render
    from stages.tabulate import compute

    sources = lineage.sources(config.evaluations)
    seeds = [source.seed for source in sources]
    rows = collect(config.evaluations, seeds)
    table = compute(rows, run.experiment, portable(run.manifest.command), sources[0].known("gold_maximum"))
    lineage.trace(table, sources)
    rollouts = {seed: read(path, plots.Sampled) for seed, path in zip(seeds, config.training, strict=False)}

    write(run.output("records.jsonl.gz"), rows)
    run.output("table.csv").write_text(to_csv(table), encoding="utf-8")
    run.output("table.json").write_text(table.model_dump_json(indent=2) + "\n", encoding="utf-8")
    pictures = draw_plots(run, rollouts, table)
    run.output("README.md").write_text(render(table, rows, pictures), encoding="utf-8")
    run.record(**{f"{m}/{line.policy}": n.value for line in table.lines for m, n in line.metrics.items()})


def portable(command: str) -> str:
    """The command without the names of folders outside this one: the page is published."""

    def shorten(found: re.Match[str]) -> str:
        path = Path(found[0])
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name

    return re.sub(r"(?<![\w.~/-])/(?!/)[^\s,\]}'\"]+", shorten, command)


def collect(paths: Sequence[str], seeds: Sequence[int]) -> "list[Scored]":
    """The evaluation rows of all seeds, each with its seed."""
    from annotate.records import Evaluation
    from stages.tabulate import Scored

    return [
        Scored(**dict(row), seed=seed)
        for path, seed in zip(paths, seeds, strict=True)
        for row in read(path, Evaluation)
    ]


def draw_plots(run: "Run", rollouts: "dict[int, list[Sampled]]", table: Table) -> list[tuple[str, str]]:
    """The plots there is data for, as (file name, caption)."""
    from stages import plots

    made = []
    if any(rollouts.values()):
        plots.training(rollouts, table, run.output("training.png"))
        made.append(("training.png", "Score of PPO's own samples over its steps, on training prompts."))
    if any("kl" in line.metrics and "reward" in line.metrics for line in table.lines):
        plots.frontier(rollouts, table, run.output("frontier.png"))
        made.append(("frontier.png", "Score against distance from SFT, with 95 % intervals in both."))
    return made


def show(path: str | Path) -> None:
    """Print the table of a report's folder, and where to look further."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    table = load(path)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    for title, metrics in ((f"{table.experiment}: quality", QUALITY), ("Health of the replies", HEALTH)):
        heads, body = grid(table, metrics, "\n")
        style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2
        shown = Grid(title=title, title_justify="left", box=style)
        for index, head in enumerate(heads):
            shown.add_column(fill(head, 14), justify="right" if index else "left")
        for cells in body:
            shown.add_row(*cells)
        console.print(shown)
    for note in marks(table):
        console.print(note, soft_wrap=True)
    console.print(
        f"[95 % intervals], clustered by prompt. Page, plots and samples: {Path(path) / 'README.md'}"
    )


def publish(path: str | Path, experiment: str, results: Path = RESULTS) -> Path:
    """Copy a complete report to results/<experiment>/, in place of the one before, and index it."""
    from stages.manifest import load_manifest

    path = Path(path)
    status = load_manifest(path).status
    if status != "complete":
        raise UserError(
            f"{path} is {status}, and only a complete report can be published: finish the run first"
        )
    target, draft = results / experiment, results / f".{experiment}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in [*(path / name for name in FILES), *sorted(path.glob("*.png"))]:
        shutil.copyfile(file, draft / file.name)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    write_index(results)
    return target


def write_index(results: Path = RESULTS) -> None:
    """One line for each published experiment, below the mark in results/README.md."""
    from stages.page import headline

    index = results / "README.md"
    above = index.read_text(encoding="utf-8").split(INDEX)[0] if index.exists() else "# Results\n\n"
    lines = [
        f"- [{folder.name}]({folder.name}/README.md): {headline(load(folder))}"
        for folder in sorted(p.parent for p in results.glob("*/table.json"))
    ]
    index.write_text(f"{above.rstrip()}\n\n{INDEX}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from stages.cli import launch

    launch("report")
