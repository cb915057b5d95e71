"""The result page: README.md of a report, written to be read on its own."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from annotate.records import draw
from stages.table import (
    HEALTH,
    QUALITY,
    REFERENCE,
    Line,
    Metric,
    Number,
    Table,
    cell,
    grid,
    marks,
    point,
    shown,
)

if TYPE_CHECKING:
    from stages.tabulate import Scored

SAMPLES = 10
LONGEST = 700
"""Characters of a sample that are shown."""


def render(table: Table, rows: Sequence["Scored"], plots: Sequence[tuple[str, str]]) -> str:
    """The page as Markdown. `plots` are (file name, caption)."""
    parts = [
        f"# {table.experiment}: what each policy reached",
        *_opening(table),
        "## Quality",
        markdown(*grid(table, QUALITY, "<br>")),
        "## Health",
        "A high score counts only with sound replies: they end, do not repeat themselves, and stay plain.",
        markdown(*grid(table, HEALTH, "<br>")),
        *marks(table),
        "## How to read this",
        *_guide(table),
        *(f"![{caption}]({file})\n\n{caption}" for file, caption in plots),
        "## Ten random prompts, side by side",
        *_samples(rows, table),
        "## Where every row comes from",
        *_lineage(table),
        "## Made by",
        f"```\n{table.command}\n```",
        "`table.csv` and `table.json` hold every number with its interval; `records.jsonl.gz` holds every "
        "reply with everything measured on it, from which the table can be computed again.",
    ]
    return "\n\n".join(parts) + "\n"


def headline(table: Table) -> str:
    """One sentence: what PPO and DPO, or whatever was trained, reached."""
    name = "headroom" if table.measure == "gold" else "proxy_win"
    metric = next(m for m in QUALITY if m.name == name)
    trained = [
        line for line in table.lines if name in line.metrics and line.policy not in ("base", REFERENCE)
    ]
    tuned = [line for line in trained if not line.policy.startswith("best-of-")] or trained
    best: dict[str, Line] = {}  # of each method the highest
    for line in sorted(tuned, key=lambda line: -line.metrics[name].value):
        best.setdefault(point(line.policy)[0], line)
    found = ", ".join(f"{line.policy} {cell(line, metric)}" for line in best.values())
    if not found:
        return "No policy beside SFT was measured."
    if name == "headroom":
        return f"Share of the headroom above SFT that was closed: {found}."
    return f"Preferred to SFT by the reward model, which is only a proxy: {found}."


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _opening(table: Table) -> Iterable[str]:
    yield headline(table)
    prompts = max(line.prompts for line in table.lines)
    seeds = f", {len(table.seeds)} seeds ({', '.join(map(str, table.seeds))})" if len(table.seeds) > 1 else ""
    judges = {line.labels for line in table.lines if line.labels}
    yield (
        f"{prompts} test prompts that no stage was trained on{seeds}; one reply of each policy to each, "
        f"drawn at temperature 1. Judgements behind the trained rows: {', '.join(sorted(judges)) or 'none'}."
    )


def _guide(table: Table) -> Iterable[str]:
    intervals = (
        "Numbers in brackets are 95 % intervals clustered by prompt: how far the mean could move with other "
        "prompts of the same kind. They say nothing of other training runs"
    )
    if len(table.seeds) > 1:
        yield f"{intervals}; the SD over seeds does."
    else:
        yield f"{intervals}; for those, run several seeds."
    if table.measure == "gold":
        yield (
            "**Gold** is the score by this world's rubric, which no training stage sees. **Headroom closed** "
            "is (policy - SFT) / (maximum - SFT). **Win rate** compares with SFT's reply to the same prompt "
            "by the rubric, ties half."
        )
    else:
        yield (
            "No truth is known in this world. The **reward model** is itself learned and is what PPO "
            "optimises, so its scores and its win rate are a proxy: they can rise while people "
            "would not agree."
        )
    yield (
        "**KL** is the mean of log π(reply) - log π_SFT(reply) over the policy's own replies; ≤ marks "
        "best-of-n's upper bound ln n - (n-1)/n. **Base-model loss** is that of the untuned model on "
        "the bare reply."
    )
    if table.reward_agreement:
        yield (
            f"**The reward model** prefers what the rubric prefers in {_by_seed(table.reward_agreement)} of "
            "held-out pairs whose rubric scores differ."
        )
    if table.demonstrations:
        yield f"**The demonstrations** that SFT learned from score {_by_seed(table.demonstrations)} in gold."
    effects = [line.detectable for line in table.lines if line.detectable]
    if effects:
        yield (
            f"**Minimum detectable effect**: with these prompts, a true difference from SFT of "
            f"{max(effects):.2f} or more in the {_measure(table)} is found with a probability of at "
            "least 80 % (two-sided test at 5 %, each row by itself)."
        )


def _by_seed(numbers: Sequence[Number]) -> str:
    return ", ".join(
        f"{n.value:.2f}" + (f" [{n.low:.2f}, {n.high:.2f}]" if n.low is not None else "") for n in numbers
    )


def _measure(table: Table) -> str:
    return "gold score" if table.measure == "gold" else "reward-model score"


def _samples(rows: Sequence["Scored"], table: Table) -> Iterable[str]:
    """The prompts are drawn by hash, and so the same whatever the policies say."""
    seed = table.seeds[0]
    of_prompt: dict[str, list[Scored]] = {}
    for row in rows:
        if row.seed == seed:
            of_prompt.setdefault(row.id, []).append(row)
    chosen = sorted(of_prompt, key=lambda id: draw("side by side", id))[:SAMPLES]
    if len(table.seeds) > 1:
        yield f"Replies of seed {seed}."
    score = Metric("", "", 2)
    for number, id in enumerate(chosen, 1):
        replies = of_prompt[id]
        turns = "<br>".join(f"**{m.role}:** {_inline(m.content)}" for m in replies[0].prompt)
        heads = ["Policy", *(["Gold"] if table.measure == "gold" else []), "Reward", "Reply"]
        body = []
        for row in replies:
            scores = [row.gold, row.reward] if table.measure == "gold" else [row.reward]
            ending = "" if row.stopped else " *(cut at the limit)*"
            cells = ["-" if value is None else shown(value, score) for value in scores]
            body.append([row.policy, *cells, _inline(row.completion) + ending])
        yield f"**{number}.** {turns}"
        yield markdown(heads, body).replace("---: |\n", "--- |\n", 1)


def _inline(text: str) -> str:
    """Text of a model or a customer, harmless inside a Markdown table: nothing in it is markup."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_{}\[\]()#|~!$])", r"\\\1", text)
    return text.strip().replace("\r", "").replace("\n", "<br>") or "*(empty)*"


def _lineage(table: Table) -> Iterable[str]:
    yield "Runs that each row was built from, youngest first, and who judged what it learned from."
    yield markdown(
        ["Row", "Judgements", "Runs"],
        [[line.policy, line.labels or "-", "<br>".join(line.runs) or "unknown"] for line in table.lines],
    ).replace("---: |", "--- |")
    if table.runs:
        yield markdown(
            ["Run", "Seed", "Commit", "Learned from", "Failed checks"],
            [[run, *_facts(table, run)] for run in table.runs],
        ).replace("---: |", "--- |")


def _facts(table: Table, run: str) -> list[str]:
    facts = table.runs[run]
    commit = (facts.commit or "unknown")[:12] + (" with uncommitted changes" if facts.dirty else "")
    judged = ", ".join(f"{count:,} judgements ({kind})" for kind, count in sorted(facts.judgements.items()))
    return [
        "-" if facts.seed is None else str(facts.seed),
        commit,
        judged or "-",
        "; ".join(facts.failed) or "-",
    ]
