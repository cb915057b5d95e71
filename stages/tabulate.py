"""From evaluation rows to the numbers of the result table, each with its interval clustered by prompt."""

import math
import re
import statistics as std
from collections.abc import Sequence
from typing import Any, Literal

from annotate import statistics
from annotate.records import DataError, Evaluation
from stages.table import METRICS, REFERENCE, Line, Metric, Number, Table

HEALTH_LIMITS = {"stopped": 0.97, "repetition": 0.02, "base_loss": 0.3, "lexicon": 0.99}
"""Replies that stop and known words: at least. Repetition and base-model loss: at most this above SFT's."""


class Scored(Evaluation):
    """An evaluation row and the seed of the run that it comes from."""

    seed: int


Pair = tuple[Scored, Scored]
"""A policy's row and the SFT row of the same seed and prompt."""


def compute(
    rows: Sequence[Scored], experiment: str, command: str = "", maximum: float | None = None
) -> Table:
    """The table, policies in the order of the rows. `maximum` is the rubric's best score, if there is one.

    With several seeds a number is the mean over all of their rows, its interval still clustered by prompt.
    Raises DataError where policies were not all asked the same prompts.
    """
    policies: dict[str, list[Scored]] = {}
    for row in rows:
        policies.setdefault(row.policy, []).append(row)
    if REFERENCE not in policies:
        raise DataError(f"no rows of the policy {REFERENCE!r}: name it among evaluate.policies")
    reference = {(row.seed, row.id): row for row in policies[REFERENCE]}
    for policy, of_policy in policies.items():
        if sorted((row.seed, row.id) for row in of_policy) != sorted(reference):
            raise DataError(
                f"{policy!r} and {REFERENCE!r} were not asked the same prompts once for each seed"
            )
    measure: Literal["gold", "reward"] = "gold" if all(row.gold is not None for row in rows) else "reward"
    maximum = maximum if measure == "gold" else None
    lines = [
        _line([(row, reference[row.seed, row.id]) for row in of_policy], measure, maximum)
        for of_policy in policies.values()
    ]
    sft = next(line for line in lines if line.policy == REFERENCE)
    for line in lines:
        line.warnings = _warnings(line, sft) if line.policy != "base" else []
    seeds = sorted({row.seed for row in rows})
    return Table(
        experiment=experiment, command=command, seeds=seeds, measure=measure, maximum=maximum, lines=lines
    )


def _line(pairs: list[Pair], measure: str, maximum: float | None) -> Line:
    policy, clusters = pairs[0][0].policy, [row.id for row, _ in pairs]
    metrics = {}
    for metric in METRICS:
        if metric.name == "headroom":
            number = _headroom(pairs, maximum) if maximum is not None else None
        else:
            number = _number(metric, pairs, measure)
        if number is not None:
            metrics[metric.name] = number
    best_of = re.match(r"best-of-(\d+)\b", policy)
    if best_of and "kl" not in metrics:
        metrics["kl"] = Number(value=statistics.best_of_n_kl(int(best_of[1])))
    detectable = None
    if policy == REFERENCE:  # against itself there is nothing to estimate
        metrics = {name: n for name, n in metrics.items() if name not in ("difference", "headroom")}
        metrics |= {name: Number(value=0.5) for name in ("win", "proxy_win") if name in metrics}
    elif "difference" in metrics:
        differences = [_value("difference", *pair, measure) or 0.0 for pair in pairs]
        detectable = statistics.minimum_detectable_effect(statistics.mean(differences, clusters))
    return Line(
        policy=policy,
        prompts=len(set(clusters)),
        rows=len(pairs),
        metrics={metric.name: metrics[metric.name] for metric in METRICS if metric.name in metrics},
        kl_is_bound=best_of is not None,
        detectable=None if detectable is None else _finite(detectable),
    )


def _value(name: str, row: Scored, sft: Scored, measure: str) -> float | None:
    if name in ("difference", "proxy_win"):
        ours, theirs = getattr(row, measure), getattr(sft, measure)
        if ours is None or theirs is None or (name == "proxy_win" and measure == "gold"):
            return None
        return (
            float(ours - theirs) if name == "difference" else 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
        )
    value = getattr(row, name)
    return None if value is None else float(value)


def _number(metric: Metric, pairs: list[Pair], measure: str) -> Number | None:
    """Over the rows that have this value: an empty reply has no loss per token."""
    values = [(_value(metric.name, row, sft, measure), row) for row, sft in pairs]
    held = [(value, row) for value, row in values if value is not None]
    if not held:
        return None
    estimate = statistics.proportion if metric.share else statistics.mean
    found = estimate([value for value, _ in held], [row.id for _, row in held])
    by_seed: dict[int, list[float]] = {}
    for value, row in held:
        by_seed.setdefault(row.seed, []).append(value)
    return _with_spread(found, [std.fmean(part) for part in by_seed.values()])


def _headroom(pairs: list[Pair], maximum: float) -> Number | None:
    """(policy - SFT) / (maximum - SFT), a ratio of means over the same prompts; None without headroom."""
    gained = [float(row.gold or 0) - float(sft.gold or 0) for row, sft in pairs]
    room = [maximum - float(sft.gold or 0) for _, sft in pairs]
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for gain, space, (row, _) in zip(gained, room, pairs, strict=True):
        by_seed.setdefault(row.seed, []).append((gain, space))
    totals = [(sum(g for g, _ in part), sum(s for _, s in part)) for part in by_seed.values()]
    if min(space for _, space in totals) <= 0:
        return None
    found = statistics.ratio(gained, room, [row.id for row, _ in pairs])
    return _with_spread(found, [gain / space for gain, space in totals])


def _with_spread(found: statistics.Estimate, seeds: Sequence[float]) -> Number:
    spread = std.stdev(seeds) if len(seeds) > 1 else None
    return Number(value=found.value, low=_finite(found.low), high=_finite(found.high), sd_over_seeds=spread)


def _warnings(line: Line, sft: Line) -> list[str]:
    """How the replies miss what a sound policy keeps, so that a high score cannot hide it."""

    def of(one: Line, name: str) -> Any:
        return one.metrics[name].value if name in one.metrics else None

    found = []
    limit = HEALTH_LIMITS
    if of(line, "stopped") < limit["stopped"]:
        found.append(
            f"stops by itself in {of(line, 'stopped'):.1%} of replies (below {limit['stopped']:.0%})"
        )
    if of(line, "repetition") > of(sft, "repetition") + limit["repetition"]:
        found.append(f"repeats {of(line, 'repetition'):.1%} of its 4-grams (SFT {of(sft, 'repetition'):.1%})")
    if of(line, "base_loss") and of(line, "base_loss") > of(sft, "base_loss") + limit["base_loss"]:
        found.append(
            f"base-model loss {of(line, 'base_loss'):.2f} per token (SFT {of(sft, 'base_loss'):.2f})"
        )
    if of(line, "lexicon") is not None and of(line, "lexicon") < limit["lexicon"]:
        found.append(
            f"{of(line, 'lexicon'):.1%} of its words are in the lexicon (below {limit['lexicon']:.0%})"
        )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
