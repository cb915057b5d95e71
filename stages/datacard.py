"""The data card: what a data set holds, how long its texts are, and what became of every raw row."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from annotate.records import Judgement, Record
from stages.importers import Place, unread

SPLITS = ("train", "validation", "test")
USES = ("sft", "preference", "policy")
SHOWN = 12
"""Row numbers of one reason in card.md; card.json has them all."""


def names(paths: Sequence[str]) -> list[str]:
    """File names, with their folder where two would be the same."""
    plain = [Path(path).name for path in paths]
    return [
        name if plain.count(name) == 1 else f"{Path(path).parent.name}/{name}"
        for path, name in zip(paths, plain, strict=True)
    ]


def source(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": Path(path).name, "sha256": digest, "columns_not_read": unread(path)}


def account(read: int, dropped: Mapping[str, Sequence[Place]]) -> dict[str, Any]:
    """Counts of raw rows, and for each reason the row numbers by file; most frequent first."""
    reasons = []
    for reason, places in sorted(dropped.items(), key=lambda item: (-len(item[1]), item[0])):
        rows: dict[str, list[int]] = {}
        for file, number in sorted(places):
            rows.setdefault(file, []).append(number)
        reasons.append({"reason": reason, "count": len(places), "rows": rows})
    lost = sum(map(len, dropped.values()))
    return {"read": read, "kept": read - lost, "dropped": lost, "reasons": reasons}


def describe(
    sources: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Any],
    records: Sequence[Record],
    judgements: Sequence[Judgement],
    corpus: Sequence[str],
) -> dict[str, Any]:
    shown = [demonstration for r in records if (demonstration := r.completion) is not None]
    better = [j.completions[0 if (j.preference or 0) > 0 else 1] for j in judgements]
    worse = [j.completions[1 if (j.preference or 0) > 0 else 0] for j in judgements]
    return {
        "sources": list(sources),
        "rows": dict(rows),
        "wrote": {
            "prompts": len(records),
            "demonstrations": len(shown),
            "judgements": len(judgements),
            "documents": len(corpus),
        },
        "prompts": _table(records),
        "demonstrations": _table([r for r in records if r.completion is not None]),
        "judgements": _table(judgements),
        "words": {
            "prompt": _lengths("\n".join(m.content for m in r.prompt) for r in records),
            "demonstration": _lengths(shown),
            "preferred reply": _lengths(better),
            "other reply": _lengths(worse),
            "document": _lengths(corpus),
        },
    }


def render(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    rows = card["rows"]
    lines = ["# Data card", "", "## Source", ""]
    lines += [f"- {_source(source)}" for source in card["sources"]]
    lines += ["", f"Of {rows['read']:,} rows {rows['kept']:,} were kept and {rows['dropped']:,} dropped."]
    lines += ["Licence and terms of use are those of the source; they are not known here."]
    if rows["reasons"]:
        lines += ["", "| dropped | reason | rows |", "|--:|---|---|"]
        lines += [f"| {r['count']:,} | {r['reason']} | {_numbers(r['rows'])} |" for r in rows["reasons"]]
    for title in ("prompts", "demonstrations", "judgements"):
        if not card["wrote"][title]:
            continue
        lines += ["", f"## {title.capitalize()}", "", f"| split | {' | '.join(USES)} |", "|---|--:|--:|--:|"]
        counts = card[title]
        lines += [f"| {s} | " + " | ".join(f"{counts[s][u]:,}" for u in USES) + " |" for s in SPLITS]
    lines += [
        "",
        "## Words",
        "",
        "| text | count | mean | median | 95 % | longest |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, words in card["words"].items():
        if words["count"]:
            cells = (f"{words[key]:,}" for key in ("count", "mean", "p50", "p95", "max"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Record | Judgement]) -> dict[str, dict[str, int]]:
    table = {split: dict.fromkeys(USES, 0) for split in SPLITS}
    for row in rows:
        table[row.split][row.use] += 1
    return table


def _lengths(texts: Iterable[str]) -> dict[str, float]:
    """In words; p50 and p95 are lengths that occur (nearest rank)."""
    words = sorted(len(text.split()) for text in texts)
    if not words:
        return {"count": 0}
    rank = {f"p{share}": words[-(-len(words) * share // 100) - 1] for share in (50, 95)}
    return {"count": len(words), "mean": round(sum(words) / len(words), 1), **rank, "max": words[-1]}


def _source(source: Mapping[str, Any]) -> str:
    if "world" in source:
        return f"{source['world']}, made with seed {source['seed']}"
    ignored = (
        f"; columns not read: {', '.join(source['columns_not_read'])}" if source["columns_not_read"] else ""
    )
    return f"{source['file']} (sha256 {source['sha256']}){ignored}"


def _numbers(rows: Mapping[str, Sequence[int]]) -> str:
    parts = []
    for file, numbers in rows.items():
        more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
        parts.append(f"{file}: {', '.join(map(str, numbers[:SHOWN]))}{more}")
    return "; ".join(parts)
