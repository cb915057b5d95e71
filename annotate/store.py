"""The label database: who is asked what, and everything anyone said. SQLAlchemy 2 on SQLite or PostgreSQL.

One transaction does all that a labelling page or a simulated annotator needs (`Store.step`): record finished
labels, hand out what comes next. It returns after COMMIT has reached the disk, so whoever is told "saved" can
rely on it. The guarantees are in `annotate.schema`, the two hot functions in `annotate.recording` and
`annotate.queue`.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, orm, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnection

from annotate import extras, queue, recording, rounds
from annotate import statements as sql
from annotate.engine import fault, open_engine, printable
from annotate.form import Answers, Form
from annotate.migrations import ready
from annotate.queue import Past, Shown
from annotate.recording import Label, Status
from annotate.records import DataError, Item, Kind, Role
from annotate.rules import Check, Rules
from annotate.schema import (
    Annotator,
    FormText,
    Guideline,
    Invitation,
    Round,
    Session,
    Slot,
)

LEASE = 1800.0
"""Seconds that a task shown to someone waits for them before someone else may take it over."""


class Who(NamedTuple):
    """The annotator of a session."""

    id: int
    name: str
    role: str


@dataclass(frozen=True)
class Current:
    """A label that counts."""

    task: str
    annotator: str
    preference: int | None
    """In canonical order: positive says that the first completion is better. None: skipped, or not asked."""
    answers: Answers
    """In canonical order."""
    order: list[int]
    """Canonical index of each completion in the order it was shown."""

    @property
    def verdict(self) -> bool:
        """Whether the main question was answered."""
        return self.preference is not None or bool(self.answers.ranking) or self.answers.rating is not None


@dataclass(frozen=True)
class Progress:
    asked: int
    done: int


class Store:
    """One label database; any number of threads and processes may use it at once.

    Raises DataError where it is no label database, is of a newer version, or cannot be reached or written.
    """

    def __init__(self, url: str | None = None):
        self.url = url or default_url()
        self._engine = open_engine(self.url)
        # Threads of one process queue here: SQLite's own way of waiting sleeps, which costs more than half.
        one_file = self._engine.dialect.name == "sqlite"
        self._one_writer: AbstractContextManager[object] = threading.Lock() if one_file else nullcontext()
        self._places: dict[tuple[int, int], queue.Place] = {}  # by round and annotator
        with self.transaction() as x:
            self.id = ready(x, printable(self.url))

    def close(self) -> None:
        self._engine.dispose()

    def annotator(self, name: str, kind: Kind = "person") -> int:
        """Id of the annotator of this pseudonym and kind, made if new."""
        if not 1 <= len(name) <= 60 or not name.isprintable() or name != name.strip():
            raise DataError(f"annotator name {name!r}: 1 to 60 printable characters, no space at either end")
        with self.transaction() as x:
            same = select(Annotator.id).where(Annotator.name == name, Annotator.kind == kind)
            found = x.execute(same).scalar()
            if found is None:
                rounds.add_missing(x, Annotator, [{"name": name, "kind": kind}])
                found = x.execute(same).scalar_one()
            return found

    def open_round(
        self,
        name: str,
        items: Sequence[Item],
        *,
        kind: Kind = "person",
        overlap: int = 1,
        reserve: Sequence[str] = (),
        salt: str = "",
        lease: float = LEASE,
        checks: Sequence[Check] = (),
        rules: Rules | None = None,
    ) -> int:
        """Make `items` what this round asks, and return the round's id.

        Tasks seen before keep their labels; tasks not listed are no longer handed out; raising `overlap` adds
        slots. With `reserve`, a task's slots belong to `overlap` of these annotators, drawn by (salt, task).
        The order shown is drawn by (salt, task, annotator). High `Item.priority` is served first.
        `checks` and repeats are mixed in by `rules`: no tasks of this round, nor their labels its own.
        """
        if reserve and overlap > len(reserve):
            raise DataError(f"overlap {overlap}, but {len(reserve)} annotators: at most one label each")
        names = {who: self.annotator(who, kind) for who in reserve}
        with self.transaction() as x:
            rounds.lock(x)
            found = x.execute(select(Round).where(Round.name == name)).first()
            if found is None:
                round_id = rounds.add(x, Round, name=name, kind=kind, overlap=overlap, lease=lease, salt=salt)
            elif found.kind != kind or found.salt != salt:
                raise DataError(
                    f"round {name!r}: opened before for kind {found.kind}, seed {found.salt}; rename it"
                )
            else:
                round_id = int(found.id)
                changed = {"overlap": overlap, "lease": lease, "opened": Round.opened + 1}
                x.execute(update(Round).where(Round.id == round_id).values(changed))
            asked = {item.task: item for item in items}
            tasks = rounds.add_tasks(x, round_id, asked)
            rounds.add_slots(x, round_id, tasks, overlap, names, salt, rounds.ranked(asked, salt))
            extras.arrange(x, round_id, rules or Rules(), checks, len(tasks))
        return round_id

    def round(self, name: str) -> int | None:
        """Id of the round of this name; None if it was never opened."""
        with self.connection() as x:
            return x.execute(select(Round.id).where(Round.name == name)).scalar()

    def step(
        self, round_id: int, annotator: int, labels: Sequence[Label] = (), want: int = 0
    ) -> tuple[list[Status], list[Shown]]:
        """Record `labels` (one status each), then top up to `want` open tasks of this annotator, returned.

        A task stays with its annotator until labelled, or taken over after its lease, so asking again gives
        the same tasks. A batch costs little more than one label.
        """
        place = self._places.get((round_id, annotator), queue.HEAD)
        with self.transaction() as x:
            recording.lock(x, annotator, labels, self.id)
            statuses = recording.record(x, annotator, labels, self.id) if labels else []
            shown, place = queue.claim(x, round_id, annotator, want, place) if want else ([], place)
        self._places[round_id, annotator] = place
        return statuses, shown

    def history(self, round_id: int, annotator: int, limit: int = 20) -> list[Past]:
        """The last tasks this annotator labelled, oldest first."""
        with self.connection() as x:
            return queue.history(x, round_id, annotator, limit)

    def held(self, round_id: int, annotator: int, keys: Sequence[str]) -> list[Shown]:
        """Those of these tasks (`Shown.key`) that are this annotator's, open or labelled."""
        with self.connection() as x:
            return queue.held(x, round_id, annotator, keys)

    def guidelines(self, text: str) -> str:
        """Keep this text, and return the name under which labels refer to it."""
        sha = _sha(text)[:16]
        with self.transaction() as x:
            rounds.add_missing(x, Guideline, [{"sha": sha, "text": text}])
        return sha

    def form(self, form: Form) -> str:
        """Keep this form, and return the name under which labels refer to it."""
        with self.transaction() as x:
            rounds.add_missing(x, FormText, [{"sha": form.sha, "form": form.model_dump_json()}])
        return form.sha

    def progress(self, round_id: int, annotator: int | None = None) -> Progress:
        """Slots of the present list; for one annotator, tasks they did and tasks they could do."""
        mine = Slot.annotator_id == annotator
        query = select(func.count(), func.count().filter(Slot.state == "done")).where(
            Slot.round_id == round_id, Slot.active
        )
        if annotator is not None:
            allowed = or_(Slot.reserved_id.is_(None), Slot.reserved_id == annotator)
            query = select(
                func.count(Slot.task_id.distinct()), func.count().filter(Slot.state == "done", mine)
            ).where(Slot.round_id == round_id, Slot.active, allowed, or_(mine, Slot.state != "done"))
        with self.connection() as x:
            asked, done = x.execute(query).one()
        return Progress(asked, done)

    def labels(self, round_id: int, part: int | None = None) -> list[Current]:
        """The labels that count, sorted by task and annotator; those on tasks no longer listed too.

        `part`: a round whose tasks alone are looked at, such as the repeats.
        """
        query = sql.LABELS if part is None else sql.LABELS_OF_PART
        with self.connection() as x:
            found = [
                Current(task, name, preference, Answers.model_validate(answers or {}), order)
                for task, name, preference, answers, order in x.execute(
                    query, {"round": round_id, "part": part}
                )
            ]
        return sorted(found, key=lambda label: (label.task, label.annotator))

    def invite(self, name: str, role: Role = "annotator") -> str:
        """A secret by which this person enters. Ends the invitation, sessions and role they had before."""
        me, secret = self.annotator(name), secrets.token_urlsafe(32)
        with self.transaction() as x:
            recording.lock(x, me, [], self.id)
            x.execute(delete(Session).where(Session.annotator_id == me))
            x.execute(delete(Invitation).where(Invitation.annotator_id == me))
            x.execute(update(Annotator).where(Annotator.id == me).values(role=role))
            x.execute(insert(Invitation), {"annotator_id": me, "sha": _sha(secret), "at": time.time()})
        return secret

    def invited(self, secret: str) -> int | None:
        """Id of the annotator whose invitation this is."""
        with self.connection() as x:
            return x.execute(select(Invitation.annotator_id).where(Invitation.sha == _sha(secret))).scalar()

    def start_session(self, annotator: int) -> str:
        """A secret for the browser's cookie. Sessions survive a restart of the server."""
        secret = secrets.token_urlsafe(32)
        with self.transaction() as x:
            x.execute(insert(Session), {"sha": _sha(secret), "annotator_id": annotator, "at": time.time()})
        return secret

    def session(self, secret: str) -> Who | None:
        """The annotator this secret was given to."""
        with self.connection() as x:
            row = x.execute(_SESSION, {"sha": _sha(secret)}).first()
        return Who(*row) if row else None

    @contextmanager
    def reading(self) -> Iterator[orm.Session]:
        """The database as it is at this moment, for pages that only read, by way of the ORM."""
        with self.connection() as x, orm.Session(x) as session:
            yield session

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that is on disk when the block is left. On SQLite it is alone from its start."""
        with self._one_writer, self._reached(), self._engine.begin() as x:
            yield x

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        with self._reached(), self._engine.connect() as x:
            yield x.execution_options(read=True)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # a guarantee of the schema held against a mistake of ours
        except (DBAPIError, NoConnection) as error:
            raise DataError(f"{printable(self.url)}: {fault(error)}") from error


def default_url() -> str:
    """The label database of this checkout: labels.db in the folder of runs."""
    return f"sqlite:///{Path(os.environ.get('PREFLOOP_RUNS', 'runs')) / 'labels.db'}"


_SESSION = (
    select(Annotator.id, Annotator.name, Annotator.role)
    .join(Session, Session.annotator_id == Annotator.id)
    .where(Session.sha == bindparam("sha"))
)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
