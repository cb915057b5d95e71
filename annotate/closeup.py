"""Single tasks with their texts, and what everyone said of them in words. No policy is named here."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, func, select

from annotate.form import Answers, Form, back
from annotate.ledger import Ledger
from annotate.queue import display_order
from annotate.recording import as_shown
from annotate.schema import Annotator, FormText, Judgement, Prompt, Response, Slot, Task, View

LONGEST = 4000
"""Characters of one text that are shown."""
LETTERS = "ABCDEFGH"
SCALE = {1: "is slightly better", 2: "is better", 3: "is much better"}


@dataclass(frozen=True)
class Opinion:
    annotator: int
    name: str
    verdict: str
    more: list[str]
    """Other answers, each in words."""
    seconds: float | None
    at: float


@dataclass
class Card:
    """One task."""

    id: int
    messages: list[dict[str, str]]
    replies: list[str]
    """In the order that the words of the opinions refer to: A, B ..."""
    opinions: list[Opinion] = field(default_factory=list)


def as_they_saw_them(ledger: Ledger, annotator: int, tasks: Sequence[int]) -> list[Card]:
    """These tasks with the replies in the order that this annotator saw, whose opinion comes first."""
    seen = (
        select(Slot.task_id, View.display_order)
        .join(View, and_(View.slot_id == Slot.id, View.lease == Slot.lease))
        .where(Slot.task_id.in_(tasks), Slot.annotator_id == annotator)
    )
    with ledger.store.reading() as x:
        orders = {task: order for task, order in x.execute(seen)}
    cards = _cards(ledger, [task for task in tasks if task in orders], lambda task: orders[task.id])
    for card in cards:
        card.opinions.sort(key=lambda opinion: opinion.annotator != annotator)
    return cards


def in_drawn_order(ledger: Ledger, tasks: Sequence[int]) -> list[Card]:
    """These tasks; the canonical order of replies may follow who wrote them, so it is not the one shown."""
    return _cards(
        ledger, tasks, lambda task: display_order("", task.key, "disagreements", len(task.response_ids))
    )


def _cards(ledger: Ledger, tasks: Sequence[int], order_of: Callable[[Task], list[int]]) -> list[Card]:
    """One for each of `tasks`, in their order."""
    highest = select(func.max(Judgement.rev)).where(Judgement.slot_id == Slot.id).correlate(Slot)
    said = (
        select(Judgement, Slot.task_id, Annotator.name, FormText.form)
        .join(Slot, Slot.id == Judgement.slot_id)
        .join(Annotator, Annotator.id == Judgement.annotator_id)
        .outerjoin(FormText, FormText.sha == Judgement.form)
        .where(Slot.task_id.in_(tasks), Judgement.rev == highest.scalar_subquery())
        .order_by(Annotator.name)
    )
    with ledger.store.reading() as x:
        asked = select(Task, Prompt).join(Prompt, Prompt.id == Task.prompt_id).where(Task.id.in_(tasks))
        found = {task.id: (task, prompt) for task, prompt in x.execute(asked)}
        ids = {i for task, _ in found.values() for i in task.response_ids}
        query = select(Response.id, Response.text).where(Response.id.in_(ids))
        texts = {i: text for i, text in x.execute(query)}
        orders = {task.id: order_of(task) for task, _ in found.values()}
        opinions = defaultdict(list)
        for judgement, task, name, form in x.execute(said):
            opinions[task].append(_opinion(judgement, name, form, orders[task]))
    return [
        Card(
            task,
            [{**message, "content": clipped(message["content"])} for message in prompt.messages],
            [clipped(texts[row.response_ids[i]]) for i in orders[task]],
            opinions[task],
        )
        for task in tasks
        for row, prompt in [found[task]]
    ]


def _opinion(judgement: Judgement, name: str, form: str | None, order: list[int]) -> Opinion:
    asked = Form() if form is None else Form.model_validate_json(form)
    answers = Answers.model_validate(judgement.answers or {}).moved(back(order))
    preference = as_shown(judgement.preference, order)
    verdict = "tie: both bad" if judgement.both_bad else in_words(asked, preference, answers)
    if judgement.reason:
        verdict += f": {judgement.reason}"
    ms = judgement.client_ms
    seconds = None if ms is None else ms / 1000
    return Opinion(judgement.annotator_id, name, verdict, _more(asked, answers), seconds, judgement.at)


def in_words(form: Form, preference: int | None, answers: Answers) -> str:
    """The main answer, replies named by letters in the order they stand."""
    if preference is not None:
        return "tie" if preference == 0 else f"{LETTERS[preference < 0]} {SCALE[abs(preference)]}"
    if answers.ranking:
        places: dict[int, list[str]] = defaultdict(list)
        for letter, rank in zip(LETTERS, answers.ranking, strict=False):
            places[rank].append(letter)
        return ", then ".join(" = ".join(places[rank]) for rank in sorted(places))
    if answers.rating is not None:
        return f"{form.grades[answers.rating - 1]} ({answers.rating} of {len(form.grades)})"
    return "skipped"


def _more(form: Form, answers: Answers) -> list[str]:
    found = []
    for name, value in answers.attributes.items():
        rating = form.kind == "rating"
        part = Answers(rating=value) if rating else Answers()
        found.append(f"{name}: {in_words(form, None if rating else value, part)}")
    for name, of in answers.flags.items():
        found.append(f"flagged {name}: {', '.join(LETTERS[i] for i in of)}")
    if answers.rationale:
        found.append(f"because: {clipped(answers.rationale)}")
    if answers.edit:
        found.append(f"a better {LETTERS[answers.edit.of]}: {clipped(answers.edit.text)}")
    return found


def clipped(text: Any) -> str:
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]} … ({left:,} characters more)"
