"""Tables of the label database. What must never happen is forbidden here, not in Python:

a task gets more labels than asked      a label needs a slot, and a task has `overlap` slots
one person labels a task twice          UNIQUE(annotator, task) on slots
a slot is held by nobody, or freed held CHECK: a slot is free exactly when it has no annotator
a label changes hands                   trigger: a slot that is done keeps its annotator and lease
a retry counts twice                    UNIQUE(token) on judgements
two current labels on one slot          UNIQUE(slot, rev); the highest revision counts
a label is rewritten or removed         triggers: views and judgements are append-only
a label on something never shown        foreign key (slot, lease, annotator) of judgements on views

The same on SQLite and PostgreSQL.
"""

from typing import Any

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    UniqueConstraint,
    event,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 5
"""Of this schema: its newest revision in migrations/versions. A database of a newer one is refused."""

Exact = String().with_variant(JSON(), "postgresql")
"""A text that may hold NUL characters, which no text column of PostgreSQL can: there it stands as JSON."""
Milliseconds = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    type_annotation_map = {list[Any]: JSON, dict[str, Any]: JSON(none_as_null=True)}


class Database(Base):
    """One row: which database this is. Browsers keep unsent labels under its id."""

    __tablename__ = "database"
    id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]


class Round(Base):
    __tablename__ = "rounds"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    overlap: Mapped[int]
    lease: Mapped[float]
    """Seconds until someone else may take over a task that was shown and not answered."""
    salt: Mapped[str]
    """Decides the order of tasks and, with the annotator, the order of the completions shown."""
    state: Mapped[str] = mapped_column(server_default="open")
    """paused: hands out nothing, and takes what comes. closed: what comes is kept, and not counted."""
    rules: Mapped[dict[str, Any] | None]
    """annotate.rules.Rules; None: nothing but its tasks."""
    part_of: Mapped[int | None] = mapped_column(ForeignKey("rounds.id"))
    """The round among whose tasks those of this one are mixed: it holds that round's checks or repeats."""
    purpose: Mapped[str] = mapped_column(server_default="label")
    """annotate.rules.Purpose"""
    opened: Mapped[int] = mapped_column(server_default="0")
    """How often its list was made since the first time: the queue may then be another one."""
    __table_args__ = (
        CheckConstraint("state in ('open', 'paused', 'closed')"),
        CheckConstraint("purpose in ('label', 'check', 'repeat')"),
        Index("rounds_parts", "part_of", "purpose", unique=True),
        CheckConstraint("kind in ('person', 'model', 'simulated')"),
        CheckConstraint("overlap >= 1"),
    )


class Prompt(Base):
    __tablename__ = "prompts"
    id: Mapped[str] = mapped_column(primary_key=True)
    """annotate.records.prompt_id"""
    messages: Mapped[list[Any]]


class Response(Base):
    __tablename__ = "responses"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[str] = mapped_column(ForeignKey("prompts.id"))
    sha: Mapped[str]
    text: Mapped[str] = mapped_column(Exact)
    __table_args__ = (UniqueConstraint("prompt_id", "sha"),)


class Task(Base):
    __tablename__ = "tasks"
    id: Mapped[int] = mapped_column(primary_key=True)
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"))
    key: Mapped[str]
    """annotate.records.task_id: the same texts are the same task, whatever produced them."""
    prompt_id: Mapped[str] = mapped_column(ForeignKey("prompts.id"))
    response_ids: Mapped[list[Any]]
    """In canonical order."""
    policies: Mapped[list[Any]]
    """Who wrote each response when the task was first asked; never sent to a browser."""
    known: Mapped[dict[str, Any] | None]
    """Of a check: annotate.rules.Known. Its slots are made when it is asked, numbered by the annotator."""
    __table_args__ = (UniqueConstraint("round_id", "key"),)


class Annotator(Base):
    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    """A pseudonym."""
    kind: Mapped[str]
    role: Mapped[str] = mapped_column(server_default="annotator")
    """A researcher may see how the round goes; both may label."""
    __table_args__ = (
        UniqueConstraint("name", "kind"),
        CheckConstraint("role in ('annotator', 'researcher')"),
        CheckConstraint("kind in ('person', 'model', 'simulated')"),
    )


class Slot(Base):
    """Room for one label on one task."""

    __tablename__ = "slots"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"))
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"))
    number: Mapped[int]
    priority: Mapped[float] = mapped_column()
    """High is served first."""
    active: Mapped[bool] = mapped_column(default=True)
    """Asked for by the list of items that the round was last opened with."""
    reserved_id: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"))
    """Only this annotator may take it; None: anyone."""
    state: Mapped[str] = mapped_column(default="free")
    annotator_id: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"))
    lease: Mapped[int] = mapped_column(default=0)
    """How often the slot has been given to someone."""
    lease_until: Mapped[float | None]
    __table_args__ = (
        UniqueConstraint("task_id", "number"),
        UniqueConstraint("annotator_id", "task_id"),
        CheckConstraint("number >= 0"),
        CheckConstraint("state in ('free', 'open', 'done')"),
        CheckConstraint("(state = 'free') = (annotator_id is null)"),
        CheckConstraint("reserved_id is null or annotator_id is null or reserved_id = annotator_id"),
        Index(
            "slots_free",
            "round_id",
            priority.desc(),
            "id",
            sqlite_where=text("state = 'free' AND active = 1"),
            postgresql_where=text("state = 'free' AND active"),
        ),
        Index(
            "slots_open",
            "round_id",
            "lease_until",
            sqlite_where=text("state = 'open' AND active = 1"),
            postgresql_where=text("state = 'open' AND active"),
        ),
        Index("slots_count", "round_id", "active", "state"),
        Index("slots_mine", "annotator_id", "round_id", "state"),
    )


class View(Base):
    """A task as one annotator was shown it: append-only."""

    __tablename__ = "views"
    slot_id: Mapped[int] = mapped_column(ForeignKey("slots.id"), primary_key=True)
    lease: Mapped[int] = mapped_column(primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"))
    display_order: Mapped[list[Any]]
    """Canonical index of each completion in the order shown: [1, 0] showed the second one first."""
    at: Mapped[float]
    """Seconds since 1970."""
    __table_args__ = (UniqueConstraint("slot_id", "lease", "annotator_id"),)


class Guideline(Base):
    """A text that told annotators how to judge, under its hash."""

    __tablename__ = "guidelines"
    sha: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(Exact)


class FormText(Base):
    """A form that annotators were given, under its digest."""

    __tablename__ = "forms"
    sha: Mapped[str] = mapped_column(primary_key=True)
    form: Mapped[str]
    """JSON of annotate.form.Form."""


class Judgement(Base):
    """Everything anyone ever said: append-only. The current label of a slot is its highest revision."""

    __tablename__ = "judgements"
    id: Mapped[int] = mapped_column(primary_key=True)
    slot_id: Mapped[int]
    lease: Mapped[int]
    annotator_id: Mapped[int]
    rev: Mapped[int | None]
    """0, 1, 2 ...; None: came after the slot was given to someone else, kept but not counted."""
    token: Mapped[str] = mapped_column(unique=True)
    preference: Mapped[int | None]
    """In canonical order: positive says that the FIRST completion is better. None: skipped, or not asked."""
    answers: Mapped[dict[str, Any] | None]
    """annotate.form.Answers in canonical order; None: nothing besides the preference."""
    form: Mapped[str | None] = mapped_column(ForeignKey("forms.sha"))
    """That the annotator was given; None: no other than a preference was asked."""
    both_bad: Mapped[bool] = mapped_column(server_default=false())
    """A tie because neither reply is any good."""
    reason: Mapped[str | None]
    guidelines: Mapped[str | None] = mapped_column(ForeignKey("guidelines.sha"))
    """Those the annotator had read; None: not known."""
    client_ms: Mapped[int | None] = mapped_column(Milliseconds)
    """Milliseconds from showing the task to the key."""
    at: Mapped[float]
    __table_args__ = (
        UniqueConstraint("slot_id", "rev"),
        ForeignKeyConstraint(
            ["slot_id", "lease", "annotator_id"], ["views.slot_id", "views.lease", "views.annotator_id"]
        ),
        CheckConstraint("preference between -3 and 3"),
        CheckConstraint("NOT both_bad OR (preference IS NOT NULL AND preference = 0)"),
        CheckConstraint("rev >= 0"),
        Index("judgements_annotator", "annotator_id", "id"),
    )


class Session(Base):
    """Who is at a browser; the cookie itself is not stored, only its hash."""

    __tablename__ = "sessions"
    sha: Mapped[str] = mapped_column(primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"))
    at: Mapped[float]


class Invitation(Base):
    """The link by which an annotator enters; as with sessions, only the hash of its secret is stored."""

    __tablename__ = "invitations"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    sha: Mapped[str] = mapped_column(unique=True)
    at: Mapped[float]


def _trigger(table: str, name: str, when: str, message: str, condition: str = "") -> None:
    head = f"CREATE TRIGGER {table}_{name} BEFORE {when} ON {table}"
    rows = "STATEMENT" if when == "truncate" else f"ROW WHEN ({condition or 'true'})"
    bodies = {"postgresql": f"{head} FOR EACH {rows} EXECUTE FUNCTION refuse('{message}')"}
    if when != "truncate":
        only = f" WHEN {condition}" if condition else ""
        bodies["sqlite"] = f"{head}{only} BEGIN SELECT RAISE(ABORT, '{message}'); END"
    for dialect, body in bodies.items():
        ddl = DDL(body).execute_if(dialect=dialect)  # type: ignore[no-untyped-call]
        event.listen(Base.metadata.tables[table], "after_create", ddl)


_refuse = DDL("""
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$
""").execute_if(dialect="postgresql")  # type: ignore[no-untyped-call]
event.listen(Base.metadata, "before_create", _refuse)
for _table in ("views", "judgements"):
    for _verb in ("update", "delete", "truncate"):
        _trigger(_table, f"no_{_verb}", _verb, f"{_table} is append-only")
_moved = "new.state <> 'done' OR new.annotator_id <> old.annotator_id OR new.lease <> old.lease"
_trigger("slots", "stay", "update", "done slots stay done", f"old.state = 'done' AND ({_moved})")
for _verb in ("delete", "truncate"):
    _trigger("slots", f"no_{_verb}", _verb, "slots are never removed")
