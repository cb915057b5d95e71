"""The result table: its numbers, and how they are written as CSV, Markdown and text.

`stages/tabulate.py` computes the numbers. Printing a table that exists needs neither numpy nor torch.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

REFERENCE = "sft"
"""The policy that win rates, KL and headroom are measured against."""
NOTHING = "-"


class Number(BaseModel):
    """A measured number with its 95 % interval over prompts and, with several seeds, its spread over them."""

    value: float
    low: float | None = None
    high: float | None = None
    sd_over_seeds: float | None = None


class RunFacts(BaseModel):
    """One run in the history of a table row."""

    commit: str | None = None
    dirty: bool | None = None
    seed: int | None = None
    failed: list[str] = []
    """Gates that this run did not pass, and why."""
    judgements: dict[str, int] = {}
    """What it learned from, by kind of annotator."""


class Line(BaseModel):
    policy: str
    labels: str = ""
    """Who judged what this policy learned from; empty where no judgement was used."""
    runs: list[str] = []
    """Folders of all runs it came from, under the folder of runs; the youngest first."""
    prompts: int
    rows: int
    metrics: dict[str, Number]
    """By name of METRICS; what this world or row does not have is absent."""
    kl_is_bound: bool = False
    """Best-of-n: `kl` is the upper bound ln n - (n-1)/n, not a measurement."""
    warnings: list[str] = []
    """Signs of a degenerate policy, from the health limits in `stages/tabulate.py`."""
    detectable: float | None = None
    """The smallest difference from SFT in the table's measure found with 80 % power (two-sided, 5 %)."""


class Table(BaseModel):
    version: Literal[1] = 1
    experiment: str
    command: str
    seeds: list[int]
    measure: Literal["gold", "reward"]
    """What rows are compared by: the rubric where the truth is known, else the reward model (a proxy)."""
    maximum: float | None = None
    """The rubric's best score."""
    lines: list[Line]
    runs: dict[str, RunFacts] = {}
    reward_agreement: list[Number] = []
    """By seed: how often the reward model prefers what the rubric prefers, on held-out pairs that differ."""
    demonstrations: list[Number] = []
    """By seed: the mean gold score of the demonstrations that SFT learned from."""

    def failed(self, line: Line) -> list[str]:
        """Gates that any run behind this line did not pass."""
        return sorted({gate for run in line.runs for gate in self.runs[run].failed})

    def name(self, line: Line) -> str:
        """The policy's name, with † where a gate failed on the way to it and ‡ where its replies look ill."""
        return line.policy + " †" * bool(self.failed(line)) + " ‡" * bool(line.warnings)


@dataclass(frozen=True)
class Metric:
    name: str
    title: str
    digits: int = 2
    percent: bool = False
    share: bool = False
    """Each row is a yes or no (a tie half): Wilson interval instead of the mean's."""


METRICS = (
    Metric("gold", "Gold"),
    Metric("headroom", "Headroom closed", 0, percent=True),
    Metric("win", "Win rate vs SFT", 0, percent=True, share=True),
    Metric("proxy_win", "Win rate vs SFT by reward model (proxy)", 0, percent=True, share=True),
    Metric("reward", "Reward-model score"),
    Metric("kl", "KL to SFT, nats per reply"),
    Metric("difference", "Difference from SFT"),
    Metric("length", "Length, tokens", 1),
    Metric("stopped", "Stops by itself", 1, percent=True, share=True),
    Metric("repetition", "Repeated 4-grams", 1, percent=True),
    Metric("base_loss", "Base-model loss, nats per token"),
    Metric("lexicon", "Words in the lexicon", 1, percent=True),
)
QUALITY = METRICS[:6]
HEALTH = METRICS[7:]


def point(policy: str) -> tuple[str, str]:
    """(method, which point of it): `dpo β=0.3` is `β=0.3` of dpo, `best-of-8 (rm)` is `n=8` of its kind."""
    if best_of := re.fullmatch(r"best-of-(\d+) (\(.*\))", policy):
        return f"best-of-n {best_of[2]}", f"n={best_of[1]}"
    method, _, name = policy.partition(" ")
    return method, name


def load(path: str | Path) -> Table:
    """The table of a report's folder."""
    return Table.model_validate_json((Path(path) / "table.json").read_text(encoding="utf-8"))


def to_csv(table: Table) -> str:
    """The whole table at six digits: no time, no date, no path, so equal results give equal bytes."""
    present = _present(table, METRICS)
    parts = ("value", "low", "high", "sd_over_seeds")
    heads = [m.name if part == "value" else f"{m.name}_{part}" for m in present for part in parts]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["policy", "labels", "failed_gates", "warnings", "prompts", "seeds", *heads, "kl_kind", "detectable"]
    )
    for line in table.lines:
        cells: list[str] = []
        for metric in present:
            number = line.metrics.get(metric.name)
            cells += [_fixed(getattr(number, part)) if number else "" for part in parts]
        marks = ["; ".join(table.failed(line)), "; ".join(line.warnings)]
        kind = ("bound" if line.kl_is_bound else "estimate") if "kl" in line.metrics else ""
        head = [line.policy, line.labels, *marks, line.prompts, len(table.seeds)]
        writer.writerow([*head, *cells, kind, _fixed(line.detectable)])
    return out.getvalue()


def grid(table: Table, metrics: Sequence[Metric], newline: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text for the metrics there are; `newline` parts a number from its interval."""
    present = _present(table, metrics)
    heads = ["Policy", *(_head(metric, table) for metric in present)]
    body = [[table.name(line), *(cell(line, metric, newline) for metric in present)] for line in table.lines]
    if len(table.seeds) > 1 and present and present[0].name in ("gold", "proxy_win"):
        heads.insert(2, f"SD over {len(table.seeds)} seeds")
        for line, cells in zip(table.lines, body, strict=True):
            sd = line.metrics[present[0].name].sd_over_seeds
            cells.insert(2, NOTHING if sd is None else shown(sd, present[0]))
    return heads, body


def marks(table: Table) -> list[str]:
    """What † and ‡ stand for: rows with the same failed check share a line."""
    failed: dict[str, list[str]] = {}
    for line in table.lines:
        for gate in table.failed(line):
            failed.setdefault(gate, []).append(line.policy)
    notes = [
        f"† {', '.join(names)}: built although a check failed: {gate}." for gate, names in failed.items()
    ]
    return notes + [f"‡ {line.policy}: {'; '.join(line.warnings)}." for line in table.lines if line.warnings]


def cell(line: Line, metric: Metric, newline: str = " ") -> str:
    """A number as `3.92 [3.80, 4.03]`, a bound as `≤ 1.20`."""
    number = line.metrics.get(metric.name)
    if number is None:
        return NOTHING
    value = shown(number.value, metric)
    if metric.name == "kl" and line.kl_is_bound:
        return f"≤ {value}"
    if number.low is None or number.high is None or number.low == number.high:
        return value
    low, high = shown(number.low, metric, unit=False), shown(number.high, metric, unit=False)
    return f"{value}{newline}[{low}, {high}]"


def shown(value: float, metric: Metric, unit: bool = True) -> str:
    text = f"{100 * value if metric.percent else value:.{metric.digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text + (" %" if metric.percent and unit else "")


def _present(table: Table, metrics: Sequence[Metric]) -> list[Metric]:
    return [m for m in metrics if any(m.name in line.metrics for line in table.lines)]


def _head(metric: Metric, table: Table) -> str:
    if metric.name == "gold" and table.maximum is not None:
        return f"{metric.title}, of {table.maximum:g}"
    return metric.title


def _fixed(value: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.6f}"
    return text.lstrip("-") if float(text) == 0 else text
