"""What checks and repeats say of the labels, and the state of a round.

accuracy(store, round_id)       every answer to a check
repeated(store, round_id)       every repeat, with the label it repeats
consistency(of_all)             how often both agree, and the lean to the completion shown first
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from sqlalchemy import or_, select, update

from annotate import extras
from annotate.agreement import first_shown_wins
from annotate.extras import Answer
from annotate.records import ranked_pairs
from annotate.rules import Rules
from annotate.schema import Annotator, Round
from annotate.statistics import Estimate, proportion
from annotate.store import Current, Progress, Store

State = Literal["open", "paused", "closed"]
Standing = Literal["open", "paused", "closed", "unqualified", "finished"]
"""What a round has for one annotator: work; none for now; none any more; none for too many checks answered
wrong; none since they gave as many labels as one person may."""


@dataclass(frozen=True)
class Repeated:
    """A task that one annotator labelled twice, the second time with its completions in reverse."""

    annotator: str
    task: str
    first: Current
    again: Current

    @property
    def alike(self) -> float:
        """Share of the comparisons in it with the same outcome (first, second, tie); a grade is one."""
        one, two = _outcomes(self.first), _outcomes(self.again)
        return sum(a == b for a, b in zip(one, two, strict=True)) / len(one)


def set_state(store: Store, round_id: int, state: State) -> None:
    """Open, pause or close a round with its parts."""
    assert state in get_args(State)
    with store.transaction() as x:
        where = or_(Round.id == round_id, Round.part_of == round_id)
        x.execute(update(Round).where(where).values(state=state))


def state(store: Store, round_id: int) -> State:
    with store.connection() as x:
        return cast(State, x.execute(select(Round.state).where(Round.id == round_id)).scalar_one())


def standing(store: Store, round_id: int, annotator: int) -> Standing:
    """Why this annotator gets no more tasks for now; "open" where only the tasks have run out."""
    with store.connection() as x:
        row = x.execute(select(Round.state, Round.rules).where(Round.id == round_id)).one()
        if row.state != "open" or row.rules is None:
            return cast(State, row.state)
        rules, have = Rules.model_validate(row.rules), extras.parts(x, round_id)
        given, done = extras.counts(x, have, annotator)
        waits = rules.first > 0 and given["label"] == 0 and done["check"] >= rules.first
        if waits and not extras.qualified(x, rules, have, annotator):
            return "unqualified"
        return "finished" if rules.at_most is not None and done["label"] >= rules.at_most else "open"


def progress(store: Store, round_id: int, annotator: int) -> Progress:
    """Tasks they did and tasks they could do, with the checks and repeats that come among so many."""
    mine = store.progress(round_id, annotator)
    with store.connection() as x:
        row = x.execute(select(Round.rules, Round.salt).where(Round.id == round_id)).one()
        if row.rules is None:
            return mine
        rules, have = Rules.model_validate(row.rules), extras.parts(x, round_id)
        name = x.execute(select(Annotator.name).where(Annotator.id == annotator)).scalar_one()
        _, done = extras.counts(x, have, annotator)
    most = mine.asked if rules.at_most is None else min(mine.asked, rules.at_most)
    labels = max(mine.done, most)
    extra = done["check"] + done["repeat"]
    return Progress(labels + max(extra, rules.extra(row.salt, name, labels)), mine.done + extra)


def has_checks(store: Store, round_id: int) -> bool:
    with store.connection() as x:
        return "check" in extras.parts(x, round_id)


def feedback(store: Store, annotator: int, tokens: Sequence[str]) -> list[tuple[str, bool, str]]:
    """(token, whether it was right, text) of those that are first answers to checks with feedback."""
    with store.connection() as x:
        return extras.feedback(x, annotator, tokens)


def accuracy(store: Store, round_id: int) -> list[Answer]:
    """Every answer to a check of this round, sorted by annotator and task."""
    with store.connection() as x:
        part = extras.parts(x, round_id).get("check")
        return [] if part is None else extras.answers(x, part)


def repeated(store: Store, round_id: int) -> list[Repeated]:
    """Every repeat in which both labels are verdicts, sorted by annotator and task."""
    with store.connection() as x:
        part = extras.parts(x, round_id).get("repeat")
    if part is None:
        return []
    before = {(label.annotator, label.task): label for label in store.labels(round_id, part)}
    found = [
        Repeated(again.annotator, again.task, before[again.annotator, again.task], again)
        for again in store.labels(part)
    ]
    verdicts = [pair for pair in found if pair.first.verdict and pair.again.verdict]
    return sorted(verdicts, key=lambda pair: (pair.annotator, pair.task))


def share_right(answers: Sequence[Answer]) -> Estimate | None:
    """Share of checks answered right, clustered by check. None without answers."""
    return proportion([float(a.right) for a in answers], [a.task for a in answers]) if answers else None


def consistency(pairs: Sequence[Repeated]) -> Estimate | None:
    """Share of repeats answered alike, clustered by task. None without repeats."""
    return proportion([pair.alike for pair in pairs], [pair.task for pair in pairs]) if pairs else None


def lean(pairs: Sequence[Repeated]) -> Estimate | None:
    """Share of decided comparisons of two that went to the one shown first, over both showings.

    Each order was shown once, so without a lean it is one half, whatever the completions are.
    """
    labels = [label for pair in pairs for label in (pair.first, pair.again)]
    shown = [(label.task, label.preference, label.order) for label in labels if label.preference is not None]
    return first_shown_wins(shown)


def _outcomes(label: Current) -> list[int]:
    if label.preference is not None:
        return [(label.preference > 0) - (label.preference < 0)]
    if label.answers.ranking:
        return [sign for _, _, sign in ranked_pairs(label.answers.ranking)]
    return [label.answers.rating or 0]
