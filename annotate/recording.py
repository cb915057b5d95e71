"""Recording labels: the first of the two hot functions of the label database.

It takes a batch, in a constant number of SQLAlchemy Core statements (`annotate.statements`), inside a
transaction that the caller opens and commits.
"""

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from sqlalchemy import Connection

from annotate import statements as sql
from annotate.form import Answers, Closed, Form, Written, fault
from annotate.keys import plain
from annotate.records import DataError

TOKEN = re.compile(r"(\d{1,19})-(\d{1,9})-[0-9a-z]{1,20}", re.ASCII)
"""slot - lease - anything that tells this attempt from others. A retry must send the same token."""

KEY = Annotated[str, Field(pattern=r"^[0-9]{1,19}-[0-9]{1,9}$")]
"""slot - lease"""
Status = Literal["saved", "duplicate", "late", "refused"]
"""duplicate: this token was recorded before. late: the task had gone to someone else, or the round
was closed; kept, not counted.
refused: the task was never shown to this annotator; nothing is kept."""


class Label(Closed):
    """What an annotator said of a task as shown: positive says the one shown FIRST is better, 0 is a tie."""

    token: Annotated[str, Field(pattern=f"^{TOKEN.pattern}$")]
    preference: Annotated[int, Field(ge=-3, le=3)] | None
    """None: skipped, or the form asks for no comparison."""
    answers: Answers = Field(default_factory=Answers)
    form: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """That was filled in, as `Store.form` names it; None: the plain comparison."""
    both_bad: bool = False
    """A tie because neither is any good."""
    reason: Annotated[str, Field(max_length=2000), Written] | None = None
    guidelines: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """Those read before, as `Store.guidelines` names them."""
    client_ms: Annotated[int, Field(ge=0, le=10**10)] | None = None
    """Milliseconds from showing the task to the key."""

    @model_validator(mode="after")
    def _both_bad_is_a_tie(self) -> Self:
        if self.both_bad and self.preference != 0:
            raise ValueError("both_bad is a tie: preference 0")
        return self


def lock(x: Connection, me: int, labels: Sequence[Label], secret: str) -> None:
    """Hold annotator `me`, so that their requests queue, and the slots they label or have open.

    Whoever waits for a slot does so here, in the order of ids, so nobody can wait in a circle. SQLite holds
    the whole file instead.
    """
    if x.dialect.name != "sqlite":
        x.execute(sql.QUEUE, {"me": me})
        x.execute(sql.LOCK, {"me": me, "slots": {_split(plain(secret, label.token))[0] for label in labels}})


def record(x: Connection, me: int, labels: Sequence[Label], secret: str) -> list[Status]:
    """Append the labels of annotator `me` and close their slots. One status for each label.

    Whatever round a label is of, it is kept there: a page may have been open since before another was served.
    Tokens may be hidden with `secret` (annotate.keys).

    Raises DataError, and records none, where one does not answer its form.
    """
    forms = _forms(x, labels)
    keys = [_split(plain(secret, label.token)) for label in labels]
    slots = {s for s, _ in keys}
    shown = {(r.slot_id, r.lease): r for r in x.execute(sql.SHOWN, {"slots": slots, "me": me})}
    revision: dict[int, int] = {}
    seen = set(x.execute(sql.SEEN, {"tokens": [label.token for label in labels]}).scalars())

    statuses: list[Status] = []
    rows = []
    for label, key in zip(labels, keys, strict=True):
        view = shown.get(key)
        rev = None
        if view is None:
            statuses.append("refused")
            continue
        if label.token in seen:
            statuses.append("duplicate")
            continue
        wrong = fault(forms[label.form], label.preference, label.answers, len(view.display_order))
        if wrong:
            raise DataError(f"label {label.token}: {wrong}")
        if view.held:
            rev = revision.get(view.slot_id, view.next_rev)
            revision[view.slot_id] = rev + 1
        seen.add(label.token)
        statuses.append("late" if rev is None else "saved")
        rows.append(_row(label, view, me, rev))
    if rows:
        x.execute(sql.JUDGE, rows)
        x.execute(sql.DONE, {"slots": [row["slot_id"] for row in rows if row["rev"] is not None]})
    return statuses


def _forms(x: Connection, labels: Sequence[Label]) -> dict[str | None, Form]:
    """The forms that these labels fill in."""
    known: dict[str | None, Form] = {None: Form()}
    asked = {label.form for label in labels if label.form is not None}
    if asked:
        known |= {row.sha: _parsed(row.form) for row in x.execute(sql.FORMS, {"shas": asked})}
    if missing := asked - known.keys():
        raise DataError(f"form {min(missing)} is not known here")
    return known


@lru_cache(maxsize=64)
def _parsed(form: str) -> Form:
    return Form.model_validate_json(form)


def as_shown(preference: int | None, order: Sequence[int]) -> int | None:
    """A preference between two completions, from canonical order to the order shown, and as well back."""
    return None if preference is None else preference if order[0] == 0 else -preference


def _split(token: str) -> tuple[int, int]:
    slot, lease, _ = token.split("-")
    return int(slot), int(lease)


def _row(label: Label, view: Any, me: int, rev: int | None) -> dict[str, Any]:
    return {
        "slot_id": view.slot_id,
        "lease": view.lease,
        "annotator_id": me,
        "rev": rev,
        "token": label.token,
        "preference": as_shown(label.preference, view.display_order),
        "answers": _stored(label.answers.moved(view.display_order)),
        "form": label.form,
        "both_bad": label.both_bad,
        "reason": label.reason,
        "read": label.guidelines,
        "client_ms": label.client_ms,
        "at": time.time(),
    }


def _stored(answers: Answers) -> dict[str, Any] | None:
    return answers.model_dump(exclude_defaults=True) or None
