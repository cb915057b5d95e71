"""What a round does for the quality of its labels, besides asking its items: checks, repeats and limits.

    check       a task whose answer is known. Everyone gets each once, among the other tasks
    repeat      a task that someone labelled before, shown to them again with its completions in reverse
    qualifying  the first checks come before anything else; who gets too few of them right gets no more

When one of them is due is a function of (salt, annotator, how much they have done), never of time.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from annotate.form import Answers, Closed, Form
from annotate.records import Message, Text, draw, task_id

EVERY = 10
"""One check for so many other tasks, or more often where all would not fit among them."""
EARLY = 5
"""The first check comes among so many tasks."""
APART = 10
"""Labels at least between a task and its repeat."""

Purpose = Literal["label", "check", "repeat"]
Share = Annotated[float, Field(gt=0, le=1)]


class Check(BaseModel):
    """A row of the file of checks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: list[Message] = Field(min_length=1)
    completions: list[Text] = Field(min_length=2)
    better: int = Field(ge=0)
    """Index of the completion that is better than each of the others."""
    feedback: Text | None = Field(default=None, min_length=1)
    """Shown after the answer, with whether it was right. None: nothing tells that it was a check."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Check":
        if self.better >= len(self.completions):
            raise ValueError(f"better: {self.better}, but the last completion is {len(self.completions) - 1}")
        if len(set(self.completions)) < len(self.completions):
            raise ValueError("completions: two are the same, so neither is better")
        return self

    @property
    def task(self) -> str:
        return task_id(self.prompt, self.completions)

    def misfit(self, form: Form) -> str | None:
        """Why it cannot be asked with this form."""
        if form.kind == "rating":
            return "checks compare replies; a form of kind rating asks for no comparison"
        return form.takes(len(self.completions))


class Qualify(BaseModel):
    """The first `checks` of the file come before any other task; the share `right` of them lets one go on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checks: int = Field(ge=1)
    right: Share


class Known(Closed):
    """What the database holds of a check besides its texts."""

    better: int
    feedback: str | None
    place: int | None
    """In the file of checks; None: no longer there, and no longer asked."""

    def right(self, preference: int | None, answers: Answers) -> bool:
        """Whether this answer, in canonical order, puts the better one before all others; a skip does not."""
        if preference is not None:
            return preference > 0 if self.better == 0 else preference < 0
        ranks = answers.ranking or []
        return bool(ranks) and ranks[self.better] == 1 and ranks.count(1) == 1


class Rules(Closed):
    """The rules of a round as the database holds them. Its defaults ask for nothing."""

    checks: int = 0
    """How many there are."""
    every: int = EVERY
    """Other tasks for each check."""
    qualify: Qualify | None = None
    repeats: float = 0
    """Share of someone's labels that is asked again."""
    at_most: int | None = None
    """Labels one person may give, checks and repeats not counted."""

    @property
    def first(self) -> int:
        """Checks that come before anything else."""
        return self.qualify.checks if self.qualify else 0

    def check_at(self, number: int, salt: str, name: str) -> float:
        """Before this check of theirs (0, 1 ...), so many other tasks are handed out to `name`."""
        if number >= self.checks:
            return math.inf
        mixed = number - self.first
        width = min(EARLY, self.every) if mixed == 0 else self.every
        return 0 if mixed < 0 else mixed * self.every + int(draw(salt, "check", name, number) * width)

    def repeat_at(self, number: int, salt: str, name: str) -> float:
        """Before this repeat of theirs (0, 1 ...), so many labels have come from `name`."""
        if not self.repeats:
            return math.inf
        return APART + 1 + int((number + draw(salt, "repeat", name, number)) / self.repeats)

    def plan(
        self, salt: str, name: str, given: Sequence[int], labelled: int, again: int, room: int
    ) -> list[Purpose]:
        """What the next `room` tasks of `name` are for.

        `given`: labels, checks and repeats handed out so far; `labelled`: tasks labelled, without the extra;
        `again`: tasks that there are to repeat.
        """
        labels, checks, repeats = given
        again += repeats
        kinds: list[Purpose] = []
        while len(kinds) < room:
            if self.check_at(checks, salt, name) <= labels:
                kinds.append("check")
                checks += 1
            elif repeats < again and self.repeat_at(repeats, salt, name) <= labelled:
                kinds.append("repeat")
                repeats += 1
            elif self.at_most is None or labels < self.at_most:
                kinds.append("label")
                labels += 1
            else:
                break
        return kinds

    def extra(self, salt: str, name: str, labels: int) -> int:
        """How many checks and repeats come with so many labels."""
        checks = repeats = 0
        while self.check_at(checks, salt, name) <= labels:
            checks += 1
        while self.repeat_at(repeats, salt, name) <= labels:
            repeats += 1
        return checks + repeats
