"""How a round goes, in numbers: what is done, how fast, how far people agree, who differs from the rest."""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from statsmodels.stats.proportion import proportion_confint

from annotate.agreement import agreement_of, alpha_of
from annotate.ledger import NOTHING, Ledger, Said, Table, Verdicts, attributes, verdicts
from annotate.schema import Annotator, Judgement, Round, Slot
from annotate.statistics import Estimate, proportion

HASTY = 2.0
"""Seconds in which nobody reads two replies."""
RECENT = 1800.0
"""Seconds that the present pace is measured over."""
LEVEL = 0.999
"""Of the intervals by which people stand out: fifty people with five shares each make many comparisons."""
LEAST = 0.1
"""How far a share has to be from the others' before it is worth a word."""
WIDTHS = [60, 300, 900, 3600, 3 * 3600, 12 * 3600, 86400, 7 * 86400, 28 * 86400]
"""Seconds that one bar of the plot may stand for."""
BARS = 48
REASONS = 10


@dataclass(frozen=True)
class Share:
    count: float
    n: int
    low: float
    """Clopper-Pearson, at LEVEL: exact, where Wilson's is too narrow so far out."""
    high: float

    @property
    def value(self) -> float:
        return self.count / self.n


@dataclass(frozen=True)
class Person:
    """One annotator. Shares are None where there is nothing to take them of."""

    id: int
    name: str
    labels: int
    verdicts: int
    late: int
    seconds: float | None
    """Median from showing a task to its first answer."""
    last: float
    skips: Share | None
    hasty: Share | None
    """Of first answers, those within HASTY seconds."""
    agreement: Share | None
    """Mean over their labels of the share of others who said the same of that task."""
    first_shown: Share | None
    """Of decided verdicts."""
    ties: Share | None
    marks: dict[str, str] = field(default_factory=dict)
    """Column -> in which way they stand out, in words."""
    checks: tuple[float, int] | None = None
    """How many were answered right, of how many."""
    repeats: tuple[float, int] | None = None
    """How many were answered alike, of how many."""


@dataclass(frozen=True)
class Reason:
    annotator: int
    name: str
    text: str
    at: float


@dataclass(frozen=True)
class Pace:
    width: float
    """Seconds of one bar."""
    start: float
    bars: list[int]
    """Labels in each."""
    per_hour: float
    """Over the last RECENT seconds."""
    seconds_left: float | None
    """At that pace; None where nobody is working."""
    last: float


@dataclass(frozen=True)
class Overview:
    name: str
    at: float
    asked: int
    done: int
    in_hand: int
    """Shown to someone who has not answered yet."""
    labels: int
    """That count, those on tasks that are no longer asked too."""
    skipped: int
    late: int
    pace: Pace | None
    agreement: Estimate | None
    alpha: Estimate | None
    ties: Estimate | None
    first_shown: Estimate | None
    attributes: dict[str, tuple[Estimate | None, Estimate | None]]
    """Agreement (where two replies are compared) and alpha."""
    people: list[Person]
    flags: dict[str, int]
    reasons: list[Reason]


def overview(ledger: Ledger) -> Overview:
    now, said = time.time(), ledger.read()
    current = said.current()
    found = verdicts(current, said.answers)
    given = np.isin(np.arange(len(current)), found.label)
    with ledger.store.reading() as x:
        name = x.execute(select(Round.name).where(Round.id == ledger.round_id)).scalar_one()
        states = select(Slot.state, func.count()).where(Slot.round_id == ledger.round_id, Slot.active)
        slots: dict[str, int] = {state: n for state, n in x.execute(states.group_by(Slot.state))}
        ids = [int(i) for i in np.unique(said.table["who"])]
        names = {
            i: n for i, n in x.execute(select(Annotator.id, Annotator.name).where(Annotator.id.in_(ids)))
        }
        skipped = np.sort(current["id"][~given])[: -10 * REASONS - 1 : -1].tolist()
        told = (
            select(Judgement.annotator_id, Judgement.reason, Judgement.at)
            .where(Judgement.id.in_(skipped), func.coalesce(Judgement.reason, "") != "")
            .order_by(Judgement.id.desc())
            .limit(REASONS)
        )
        reasons = [Reason(who, names[who], str(text), at) for who, text, at in x.execute(told)]
    asked, done = sum(slots.values()), slots.get("done", 0)
    counting = current["id"][np.isin(current["id"], list(said.answers))] if said.answers else ()
    flags = Counter(flag for i in counting for flag in said.answers[int(i)].get("flags", ()))
    compared = not any("rating" in answer for answer in said.answers.values())
    decided, wins = _first_shown(current, found)
    clusters = found.task[found.unit]
    each = attributes(current, said.answers).items()
    return Overview(
        name=name,
        at=now,
        asked=asked,
        done=done,
        in_hand=slots.get("open", 0),
        labels=len(current),
        skipped=int((~given).sum()),
        late=int((said.table["rev"] < 0).sum()),
        pace=_pace(said.table[said.table["rev"] == 0]["at"], now, asked - done),
        agreement=agreement_of(found.counts) if compared else None,
        alpha=alpha_of(found.counts),
        ties=_estimate(found.value == 0, clusters) if compared else None,
        first_shown=_estimate(wins, current["task"][decided]) if compared else None,
        attributes={n: (agreement_of(c) if compared else None, alpha_of(c)) for n, c in each},
        people=_people(said, current, found, names, compared),
        flags=dict(flags.most_common()),
        reasons=reasons,
    )


def disputed(ledger: Ledger, limit: int) -> list[int]:
    """Ids of the tasks on which labels lie furthest apart, by the mean distance of two of them."""
    said = ledger.read()
    found = verdicts(said.current(), said.answers)
    values, n = np.arange(7), found.counts.sum(axis=1)
    apart = np.abs(values[:, None] - values[None, :])
    distance = np.einsum("uc,ck,uk->u", found.counts, apart, found.counts) / np.maximum(n * (n - 1), 1)
    tasks, place = np.unique(found.task, return_inverse=True)
    mean = np.bincount(place, weights=distance) / np.maximum(np.bincount(place), 1)
    order = np.lexsort((-tasks, -mean))[:limit]
    return [int(task) for task in tasks[order[mean[order] > 0]]]


def newest(ledger: Ledger, annotator: int, limit: int) -> list[int]:
    """Ids of the tasks that this annotator labelled last, the newest first."""
    said = ledger.read().current()
    mine = said[said["who"] == annotator]
    return [int(task) for task in mine["task"][np.argsort(-mine["id"])][:limit]]


def _pace(at: NDArray[np.float64], now: float, left: int) -> Pace | None:
    if len(at) == 0:
        return None
    first, last = float(at.min()), float(at.max())
    end = now if left else last
    width = next((w for w in WIDTHS if end // w - first // w < BARS), WIDTHS[-1])
    start = first // width * width
    bars = np.bincount(((at - start) // width).astype(int), minlength=int((end - start) // width) + 1)
    recent = int((at > now - RECENT).sum())
    per_hour = recent * 3600 / min(RECENT, max(now - first, 60.0))
    return Pace(width, start, bars.tolist(), per_hour, left * 3600 / per_hour if recent else None, last)


def _first_shown(current: Table, found: Verdicts) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Indices of current labels that prefer one of two, and whether it is the one shown first."""
    preference = current["preference"]
    decided = np.flatnonzero((preference != NOTHING) & (preference != 0))
    return decided, (preference[decided] > 0) == (current["first"][decided] == "0")


def _estimate(values: NDArray[np.bool_], clusters: NDArray[np.int64]) -> Estimate | None:
    return proportion(values.astype(float), clusters) if len(values) else None


def _people(
    said: Said, current: Table, found: Verdicts, names: dict[int, str], compared: bool
) -> list[Person]:
    """All who said anything, most labels first."""
    ids = np.array(sorted(names), dtype=np.int64)
    if len(ids) == 0:
        return []

    def of(rows: Table) -> NDArray[np.int64]:
        return np.searchsorted(ids, rows["who"])

    who = of(current)
    given = np.zeros(len(current))
    given[found.label] = 1
    first = said.table[(said.table["rev"] == 0) & (said.table["ms"] >= 0)]
    decided, wins = _first_shown(current, found)
    shared, same = _same_as_others(found, len(current), compared)
    nobody: list[Share | None] = [None] * len(ids)
    columns = {
        "skips": _shares(who, 1 - given, len(ids)),
        "hasty": _shares(of(first), first["ms"] < HASTY * 1000, len(ids)),
        "agreement": _shares(who[shared], same, len(ids)),
        "first_shown": _shares(who[decided], wins, len(ids)),
        "ties": _shares(who[found.label], found.value == 0, len(ids)) if compared else nobody,
    }
    labels = np.bincount(who, minlength=len(ids))
    answered = np.bincount(who, weights=given, minlength=len(ids))
    late = np.bincount(of(said.table[said.table["rev"] < 0]), minlength=len(ids))
    last = np.zeros(len(ids))
    np.maximum.at(last, of(said.table), said.table["at"])
    first = first[np.argsort(first["who"], kind="stable")]
    known, starts = np.unique(first["who"], return_index=True)
    times = np.split(first["ms"], starts[1:]) if len(first) else []
    seconds = {int(i): float(np.median(ms)) / 1000 for i, ms in zip(known, times, strict=True)}
    people = []
    for n, i in enumerate(ids.tolist()):
        mine = {name: column[n] for name, column in columns.items()}
        marks = {name: words for name, column in columns.items() if (words := _stands_out(name, column, n))}
        counts = (int(labels[n]), int(answered[n]), int(late[n]))
        people.append(
            Person(i, names[i], *counts, seconds.get(i), float(last[n]), marks=marks, **mine)  # type: ignore[arg-type]
        )
    return sorted(people, key=lambda person: (-person.labels, person.name))


def _same_as_others(
    found: Verdicts, labels: int, compared: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices of labels on tasks that others labelled too, and the share of those who said the same."""
    verdict = np.sign(found.value) if compared else found.value
    alike = found.counts
    if compared:
        alike = np.stack([alike[:, :3].sum(1), alike[:, 3], alike[:, 4:].sum(1)], axis=1)
    others = found.counts.sum(axis=1)[found.unit] - 1
    same = alike[found.unit, verdict + alike.shape[1] // 2] - 1
    several = others > 0
    label, share = found.label[several], same[several] / others[several]
    parts = np.bincount(label, minlength=labels)
    shared = np.flatnonzero(parts)
    return shared, (np.bincount(label, weights=share, minlength=labels)[shared] / parts[shared])


def _shares(who: NDArray[np.int64], hits: NDArray[np.generic], people: int) -> list[Share | None]:
    n = np.bincount(who, minlength=people)
    count = np.bincount(who, weights=hits.astype(float), minlength=people)
    low, high = proportion_confint(count, np.maximum(n, 1), alpha=1 - LEVEL, method="beta")
    every = zip(count.tolist(), n.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Share(*each) if each[1] else None for each in every]


def _stands_out(column: str, shares: list[Share | None], n: int) -> str | None:
    """In which way person `n` differs from the others by more than chance and LEAST, or None."""
    mine = shares[n]
    rest = [share for i, share in enumerate(shares) if share and i != n]
    if mine is None:
        return None
    if column == "hasty":
        return f"{mine.value:.0%} of the labels in under {HASTY:g} s" if mine.low > LEAST else None
    if column == "first_shown":
        side = "first" if mine.value > 0.5 else "second"
        far = abs(mine.value - 0.5) >= LEAST and not mine.low <= 0.5 <= mine.high
        return f"prefers the reply shown {side} in {max(mine.value, 1 - mine.value):.0%}" if far else None
    if not rest:
        return None
    theirs = sum(share.count for share in rest) / sum(share.n for share in rest)
    if abs(mine.value - theirs) < LEAST or mine.low <= theirs <= mine.high:
        return None
    wrong_way = {"agreement": mine.value > theirs, "skips": mine.value < theirs, "ties": False}[column]
    words = {"agreement": "agrees with others in", "skips": "skips", "ties": "says tie in"}[column]
    return None if wrong_way else f"{words} {mine.value:.0%}, the others {theirs:.0%}"
