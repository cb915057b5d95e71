"""Forms: what annotators are asked of a task, as a YAML file says it.

    configs/forms/helpful-honest-harmless.yaml

The kind decides what a task is: `pairwise` compares two replies from -3 to 3, `ranking` orders two or more,
`rating` grades a single one. Every label carries the digest of the form it was given under.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST = 8
"""Replies in one ranking: what keys 1 to 8 reach, and more than people can order well."""
LONGEST = 10_000
"""Characters of a better answer or a rationale: one label fits in a message to the server (gate.LARGEST)."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character; take it out")
    return text


Written = AfterValidator(_without_nul)
"""By an annotator, as opposed to a model: PostgreSQL could not store it as text, and nobody means it."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,29}$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Long = Annotated[str, StringConstraints(max_length=LONGEST), Written]


class Closed(BaseModel):
    """What comes from outside: no field that is not known, no value that would have to be converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Form(Closed):
    """The questions, in the order asked; the main one comes last and its answer saves the label."""

    kind: Literal["pairwise", "ranking", "rating"] = "pairwise"
    question: Line | None = None
    """The main question. None: the usual one of the kind."""
    attributes: dict[Name, Line] = Field(default={}, max_length=6)
    """Name -> question. Asked before the main one, on the same scale; not of a ranking."""
    grades: list[Line] = Field(default=["very bad", "bad", "fair", "good", "very good"])
    """Of a rating, from 1 on: 2 to 7 of them."""
    flags: dict[Name, Line] = Field(default={}, max_length=8)
    """Name -> what it marks. Any reply may be given any of them."""
    rationale: Literal["no", "optional", "required"] = "no"
    edit: bool = False
    """May annotators write a better answer?"""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "ranking" and self.attributes:
            raise ValueError("attributes: a ranking asks one question; use pairwise or rating")
        if not 2 <= len(self.grades) <= 7:
            raise ValueError(f"grades: 2 to 7 of them, not {len(self.grades)}")
        return self

    @property
    def asked(self) -> str:
        return self.question or QUESTIONS[self.kind]

    @property
    def sha(self) -> str:
        """Digest of all that it says, 16 hex digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def takes(self, replies: int) -> str | None:
        """Why a task of so many replies is none for this form."""
        low, high = {"pairwise": (2, 2), "ranking": (2, MOST), "rating": (1, 1)}[self.kind]
        if low <= replies <= high:
            return None
        wanted = str(low) if low == high else f"{low} to {high}"
        return f"{replies} replies, a form of kind {self.kind} needs {wanted}"


QUESTIONS = {
    "pairwise": "Which reply answers the last message better?",
    "ranking": "Order the replies, the best first.",
    "rating": "How good is this reply to the last message?",
}


class Edit(Closed):
    """A better answer, written by the annotator."""

    of: Annotated[int, Field(ge=0, lt=MOST)]
    """Index of the reply it was made from."""
    text: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST), Written]


class Answers(Closed):
    """Everything that was answered besides a preference. Indices count replies, in the order of its owner."""

    ranking: Annotated[list[Annotated[int, Field(ge=1, le=MOST)]], Field(max_length=MOST)] | None = None
    """Rank of each reply: 1 = best, equal numbers = tie."""
    rating: Annotated[int, Field(ge=1, le=7)] | None = None
    attributes: dict[Name, Annotated[int, Field(ge=-3, le=7)]] = Field(default={}, max_length=6)
    flags: dict[Name, Annotated[list[Annotated[int, Field(ge=0, lt=MOST)]], Field(max_length=MOST)]] = Field(
        default={}, max_length=8
    )
    """Name -> the replies that have it."""
    rationale: Long | None = None
    edit: Edit | None = None

    def moved(self, order: Sequence[int]) -> "Answers":
        """The same answers where reply i goes to place order[i]."""
        turn = -1 if list(order) == [1, 0] else 1  # attributes compare two replies, or grade one
        ranking = self.ranking and [self.ranking[i] for i in back(order)]
        return Answers(
            ranking=ranking,
            rating=self.rating,
            attributes={name: turn * value for name, value in self.attributes.items()},
            flags={name: sorted(order[i] for i in of) for name, of in self.flags.items()},
            rationale=self.rationale,
            edit=self.edit and Edit(of=order[self.edit.of], text=self.edit.text),
        )

    @property
    def empty(self) -> bool:
        return self == Answers()


def back(order: Sequence[int]) -> list[int]:
    """The order that undoes this one."""
    return [list(order).index(place) for place in range(len(order))]


def fault(form: Form, preference: int | None, answers: Answers, replies: int) -> str | None:
    """Why this is no answer to the form, or None. A skip answers nothing."""
    verdict = {"pairwise": preference, "ranking": answers.ranking, "rating": answers.rating}
    given = [kind for kind, value in verdict.items() if value is not None]
    if given and given != [form.kind]:
        return f"{' and '.join(given)} where the form asks for a {form.kind}"
    unknown = [*(set(answers.attributes) - set(form.attributes)), *(set(answers.flags) - set(form.flags))]
    if unknown:
        return f"{sorted(unknown)[0]} is not in the form"
    if answers.edit is not None and not form.edit:
        return "the form asks for no better answer"
    if answers.rationale is not None and form.rationale == "no":
        return "the form asks for no rationale"
    places = [place for of in answers.flags.values() for place in of] + (
        [answers.edit.of] if answers.edit else []
    )
    if any(place >= replies for place in places):
        return f"reply {max(places) + 1} of {replies}"
    return _unfinished(form, answers, replies) if given else None


def _unfinished(form: Form, answers: Answers, replies: int) -> str | None:
    """What a label that is no skip lacks, or has out of range."""
    missing = [name for name in form.attributes if name not in answers.attributes]
    if missing:
        return f"{missing[0]} is not answered"
    low, high = (-3, 3) if form.kind == "pairwise" else (1, len(form.grades))
    values = [*answers.attributes.values(), *([answers.rating] if answers.rating is not None else [])]
    if any(not low <= value <= high for value in values):
        return f"an answer outside {low} to {high}"
    if answers.ranking is not None and not _is_ranking(answers.ranking, replies):
        return f"ranking {answers.ranking} of {replies} replies"
    if form.rationale == "required" and not (answers.rationale or "").strip():
        return "the form asks for a rationale"
    return None


def _is_ranking(ranks: Sequence[int], replies: int) -> bool:
    """Ranks without gaps, 1 the best; ties share one: [1, 2, 2, 3]."""
    return len(ranks) == replies and set(ranks) == set(range(1, len(set(ranks)) + 1))
