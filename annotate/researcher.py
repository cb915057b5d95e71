"""The researcher's pages: how the round goes, one annotator's labels, the tasks on which people differ.

No page names a policy: a researcher may label too. `annotate.gate` lets only researchers reach them.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import func, select

from annotate import quality
from annotate.closeup import as_they_saw_them, in_drawn_order
from annotate.ledger import Ledger
from annotate.overview import Overview, Pace, Person, Share, disputed, newest, overview
from annotate.records import DataError
from annotate.schema import Annotator, Judgement, Round, Slot
from annotate.statistics import Estimate
from annotate.store import Store

SHARE = 0.05
"""Of one processor's time that is spent on reading the round again, however many look at it."""
LABELS = 50
TASKS = 30


@dataclass(frozen=True)
class Column:
    """Of the table of annotators; one that says nothing of anybody is left out."""

    key: str
    title: str
    hint: str
    text: Callable[[Any], str]
    """Of the value, None where it is missing."""


def share(value: Share | None) -> str:
    return "" if value is None else percent(value.value)


def tally(value: tuple[float, int] | None) -> str:
    return f"{value[0] / value[1]:.0%} of {value[1]}" if value else ""


def percent(value: float) -> str:
    return f"{value:.0%}"


COLUMNS = [
    Column("labels", "Labels", "that count, skips too", "{:,}".format),
    Column("verdicts", "Verdicts", "labels that are no skips", "{:,}".format),
    Column("skips", "Skips", "share of their labels", share),
    Column("seconds", "Seconds", "median from seeing a task to the first answer", lambda s: seconds(s)),
    Column("hasty", "Under 2 s", "share of first answers", share),
    Column("agreement", "Agree", "how often another label on the same task says the same", share),
    Column("first_shown", "First shown", "share of decided verdicts; 50% is no lean", share),
    Column("ties", "Ties", "share of verdicts", share),
    Column("checks", "Checks", "share of tasks with a known answer that they answered right", tally),
    Column("repeats", "Repeats", "share of tasks shown twice that they answered alike", tally),
    Column(
        "late", "Late", "came after the task had gone to someone else; not counted", lambda n: f"{n or ''}"
    ),
]


def add_researcher(app: FastAPI, store: Store, round_id: int, title: str) -> None:
    """Routes of the pages about this round."""
    ledger = Ledger(store, round_id)
    recent = Recent(ledger)
    # All labels so far are read while the server starts, so that nobody waits for it.
    threading.Thread(target=recent.begin, daemon=True).start()

    def page(request: Request, name: str, **values: Any) -> Response:
        who = request.scope["annotator"]
        common = {"title": title, "who": who and who.name, "now": time.time()}
        return HTMLResponse(TEMPLATES.get_template(name).render(common | values))

    @app.get("/round")
    def whole(request: Request) -> Response:
        found = recent.overview()
        columns = [c for c in COLUMNS if any(c.text(getattr(p, c.key)) for p in found.people)]
        now = quality.state(store, round_id)
        return page(
            request,
            "round.html",
            it=found,
            columns=columns,
            facts=facts(found),
            attributes=attributes(found),
            state=now,
        )

    @app.post("/round/state")
    def change(state: str = Form("")) -> Response:
        if state not in get_args(quality.State):
            return PlainTextResponse(f"state: {', '.join(get_args(quality.State))}", 422)
        quality.set_state(store, round_id, cast(quality.State, state))
        return RedirectResponse("/round", 303)

    @app.get("/round/annotator/{annotator}")
    def one(request: Request, annotator: int) -> Response:
        people = {person.id: person for person in recent.overview().people}
        if annotator not in people:
            return PlainTextResponse("nobody of that number has labelled in this round", 404)
        cards = as_they_saw_them(ledger, annotator, newest(ledger, annotator, LABELS))
        return page(request, "annotator.html", person=people[annotator], cards=cards, columns=COLUMNS)

    @app.get("/round/disagreements")
    def differ(request: Request) -> Response:
        return page(request, "disagreements.html", cards=in_drawn_order(ledger, disputed(ledger, TASKS)))

    for name, kind in (("round.css", "text/css"), ("round.js", "text/javascript")):
        text = TEMPLATES.loader.get_source(TEMPLATES, name)[0]  # type: ignore[union-attr]
        app.get(f"/round/{name}")(lambda text=text, kind=kind: Response(text, media_type=kind))


class Recent:
    """The overview, one for everyone who looks; whoever asks while it is read again waits for that."""

    def __init__(self, ledger: Ledger):
        self._ledger, self._lock = ledger, threading.Lock()
        self._found: Overview | None = None
        self._again = 0.0

    def begin(self) -> None:
        with suppress(DataError):  # whoever looks is told
            self.overview()

    def overview(self) -> Overview:
        with self._lock:
            start = time.monotonic()
            if self._found is None or start >= self._again:
                # The first reads all, and loads libraries: not what the next will cost.
                first = self._found is None
                self._found = with_quality(self._ledger, overview(self._ledger))
                end = time.monotonic()
                self._again = end if first else end + (end - start) / SHARE
            return self._found


def with_quality(ledger: Ledger, found: Overview) -> Overview:
    """With what checks and repeats say of each annotator, whose name is theirs alone in a round."""
    checks: dict[str, list[float]] = defaultdict(list)
    repeats: dict[str, list[float]] = defaultdict(list)
    for answer in quality.accuracy(ledger.store, ledger.round_id):
        checks[answer.annotator].append(float(answer.right))
    for pair in quality.repeated(ledger.store, ledger.round_id):
        repeats[pair.annotator].append(pair.alike)

    def of(person: Person, values: dict[str, list[float]]) -> tuple[float, int] | None:
        found = values.get(person.name)
        return (sum(found), len(found)) if found else None

    everyone = [*found.people, *_only_checked(ledger, {person.id for person in found.people})]
    people = [replace(p, checks=of(p, checks), repeats=of(p, repeats)) for p in everyone]
    return replace(found, people=people)


def _only_checked(ledger: Ledger, known: set[int]) -> list[Person]:
    """Those besides the `known` who answered checks and gave no label, as who did not qualify."""
    said = (
        select(Annotator.id, Annotator.name, func.max(Judgement.at))
        .join(Judgement, Judgement.annotator_id == Annotator.id)
        .join(Slot, Slot.id == Judgement.slot_id)
        .join(Round, Round.id == Slot.round_id)
        .where(Round.part_of == ledger.round_id, Round.purpose == "check", Judgement.rev.is_not(None))
        .group_by(Annotator.id, Annotator.name)
        .order_by(Annotator.name)
    )
    nothing: dict[str, Any] = dict.fromkeys(("seconds", "skips", "hasty", "agreement", "first_shown", "ties"))
    with ledger.store.reading() as x:
        found = x.execute(said).all()
    return [Person(i, name, 0, 0, 0, last=at, **nothing) for i, name, at in found if i not in known]


@dataclass(frozen=True)
class Fact:
    """A number that stands large at the top, and what it means."""

    title: str
    number: str
    note: str


def facts(it: Overview) -> list[Fact]:
    found = []
    if it.agreement:
        note = f"of {it.agreement.n:,} pairs of labels on one task {interval(it.agreement)}"
        found.append(Fact("Agreement", percent(it.agreement.value), note))
    if it.alpha:
        note = f"agreement beyond chance; 1 is perfect {interval(it.alpha, '{:.2f}'.format)}"
        found.append(Fact("Krippendorff's alpha", f"{it.alpha.value:.2f}", note))
    if it.ties:
        found.append(Fact("Ties", percent(it.ties.value), f"of {it.ties.n:,} verdicts {interval(it.ties)}"))
    if it.first_shown:
        note = f"of decided verdicts; 50% is no lean {interval(it.first_shown)}"
        found.append(Fact("For the reply shown first", percent(it.first_shown.value), note))
    return found


def measured(found: Estimate | None, text: Callable[[float], str]) -> str:
    return f"{text(found.value)} {interval(found, text)}" if found else ""


def attributes(it: Overview) -> list[tuple[str, str, str]]:
    """Name, agreement and alpha of each."""
    alpha = "{:.2f}".format
    return [(name, measured(raw, percent), measured(a, alpha)) for name, (raw, a) in it.attributes.items()]


def interval(found: Estimate, text: Callable[[float], str] = percent) -> str:
    return "" if math.isnan(found.low) else f"({text(found.low)} to {text(found.high)})"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def span(value: float) -> str:
    """A length of time in words, roundly."""
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if value >= 2 * size or (name == "minute" and value >= size):
            count = round(value / size)
            return f"{count:,} {name}{'s' if count != 1 else ''}"
    return "less than a minute"


def clock(at: float) -> str:
    """Time and, unless it is today's, date, on the server's clock."""
    then = time.localtime(at)
    today = time.strftime("%Y-%m-%d") == time.strftime("%Y-%m-%d", then)
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", then)


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    height: float
    says: str


def bars(pace: Pace, width: int, height: int) -> tuple[list[Bar], int, float]:
    """(bars in a box of this size, labels per hour at its upper edge, width of a bar)."""
    top = max(pace.bars) or 1
    step = min(width / len(pace.bars), 40)
    found = [
        Bar(n * step, height * (1 - count / top), height * count / top, f"{clock(start)}: {count:,} labels")
        for n, count in enumerate(pace.bars)
        for start in [pace.start + n * pace.width]
    ]
    return found, round(top * 3600 / pace.width), step


def stands_out(people: list[Person]) -> list[Person]:
    return [person for person in people if person.marks]


TEMPLATES = Environment(
    loader=PackageLoader("annotate", "page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
for _function in (bars, clock, percent, seconds, span, stands_out):
    TEMPLATES.filters[_function.__name__] = _function
