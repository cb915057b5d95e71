"""What customers write about, and what the shop does about it: the truth behind every ticket."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    remedy: str
    """The one thing that helps; `do_<remedy>` in rules/replies.txt says how it is offered."""
    sorry: bool
    """Is there a reason to apologise?"""


PROBLEMS: dict[str, Problem] = {
    "broken": Problem("replace", True),
    "late": Problem("trace", True),
    "wrong": Problem("exchange", True),
    "charge": Problem("correct", True),
    "return": Problem("return", False),
    "question": Problem("guide", False),
    "praise": Problem("praise", False),
    "cancel": Problem("cancel", False),
    "address": Problem("address", False),
}
REMEDIES: tuple[str, ...] = tuple(problem.remedy for problem in PROBLEMS.values())
