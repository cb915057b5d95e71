"""The first schema: rounds, tasks, slots, views and judgements, with their guarantees."""

import uuid
from typing import Any

import sqlalchemy as sa
from alembic import op

from annotate.schema import Exact, Milliseconds

revision, down_revision = "1", None

Type = type[sa.types.TypeEngine[Any]] | sa.types.TypeEngine[Any]
KIND = "kind in ('person', 'model', 'simulated')"


def upgrade() -> None:
    asked()
    said()
    if op.get_bind().dialect.name == "postgresql":
        op.execute(REFUSE)
    for table, verb, name, message, condition in TRIGGERS:
        head = f"CREATE TRIGGER {table}_{name} BEFORE {verb} ON {table}"
        if op.get_bind().dialect.name == "postgresql":
            rows = "STATEMENT" if verb == "truncate" else f"ROW WHEN ({condition or 'true'})"
            op.execute(f"{head} FOR EACH {rows} EXECUTE FUNCTION refuse('{message}')")
        elif verb != "truncate":
            only = f" WHEN {condition}" if condition else ""
            op.execute(f"{head}{only} BEGIN SELECT RAISE(ABORT, '{message}'); END")


def key(name: str, type_: Type = sa.Integer, of: str | None = None) -> sa.Column[Any]:
    return sa.Column(name, type_, *_refers(of), primary_key=True)


def need(name: str, type_: Type, of: str | None = None, unique: bool | None = None) -> sa.Column[Any]:
    return sa.Column(name, type_, *_refers(of), nullable=False, unique=unique)


def _refers(of: str | None) -> list[sa.ForeignKey]:
    return [sa.ForeignKey(of)] if of else []


def asked() -> None:
    op.create_table("database", key("id", sa.String), need("version", sa.Integer))
    op.execute(sa.text("INSERT INTO database VALUES (:id, 1)").bindparams(id=uuid.uuid4().hex))
    op.create_table(
        "rounds",
        key("id"),
        need("name", sa.String, unique=True),
        need("kind", sa.String),
        need("overlap", sa.Integer),
        need("lease", sa.Double),
        need("salt", sa.String),
        sa.CheckConstraint(KIND),
        sa.CheckConstraint("overlap >= 1"),
    )
    op.create_table("prompts", key("id", sa.String), need("messages", sa.JSON))
    op.create_table(
        "responses",
        key("id"),
        need("prompt_id", sa.String, "prompts.id"),
        need("sha", sa.String),
        need("text", Exact),
        sa.UniqueConstraint("prompt_id", "sha"),
    )
    op.create_table(
        "tasks",
        key("id"),
        need("round_id", sa.Integer, "rounds.id"),
        need("key", sa.String),
        need("prompt_id", sa.String, "prompts.id"),
        need("response_ids", sa.JSON),
        need("policies", sa.JSON),
        sa.UniqueConstraint("round_id", "key"),
    )
    op.create_table(
        "annotators",
        key("id"),
        need("name", sa.String),
        need("kind", sa.String),
        sa.UniqueConstraint("name", "kind"),
        sa.CheckConstraint(KIND),
    )
    slots()


def slots() -> None:
    op.create_table(
        "slots",
        key("id"),
        need("task_id", sa.Integer, "tasks.id"),
        need("round_id", sa.Integer, "rounds.id"),
        need("number", sa.Integer),
        need("priority", sa.Double),
        need("active", sa.Boolean),
        sa.Column("reserved_id", sa.Integer, sa.ForeignKey("annotators.id")),
        need("state", sa.String),
        sa.Column("annotator_id", sa.Integer, sa.ForeignKey("annotators.id")),
        need("lease", sa.Integer),
        sa.Column("lease_until", sa.Double),
        sa.UniqueConstraint("task_id", "number"),
        sa.UniqueConstraint("annotator_id", "task_id"),
        sa.CheckConstraint("number >= 0"),
        sa.CheckConstraint("state in ('free', 'open', 'done')"),
        sa.CheckConstraint("(state = 'free') = (annotator_id is null)"),
        sa.CheckConstraint("reserved_id is null or annotator_id is null or reserved_id = annotator_id"),
    )
    for state, columns in (("free", [sa.text("priority desc"), "id"]), ("open", ["lease_until"])):
        only = f"state = '{state}' AND active"
        op.create_index(
            f"slots_{state}",
            "slots",
            ["round_id", *columns],
            sqlite_where=sa.text(f"{only} = 1"),
            postgresql_where=sa.text(only),
        )
    op.create_index("slots_count", "slots", ["round_id", "active", "state"])
    op.create_index("slots_mine", "slots", ["annotator_id", "round_id", "state"])


def said() -> None:
    op.create_table(
        "views",
        key("slot_id", of="slots.id"),
        key("lease"),
        need("annotator_id", sa.Integer, "annotators.id"),
        need("display_order", sa.JSON),
        need("at", sa.Double),
        sa.UniqueConstraint("slot_id", "lease", "annotator_id"),
    )
    op.create_table(
        "judgements",
        key("id"),
        need("slot_id", sa.Integer),
        need("lease", sa.Integer),
        need("annotator_id", sa.Integer),
        sa.Column("rev", sa.Integer),
        need("token", sa.String, unique=True),
        sa.Column("preference", sa.Integer),
        sa.Column("reason", sa.String),
        sa.Column("client_ms", Milliseconds),
        need("at", sa.Double),
        sa.UniqueConstraint("slot_id", "rev"),
        sa.ForeignKeyConstraint(
            ["slot_id", "lease", "annotator_id"], ["views.slot_id", "views.lease", "views.annotator_id"]
        ),
        sa.CheckConstraint("preference between -3 and 3"),
        sa.CheckConstraint("rev >= 0"),
    )
    op.create_index("judgements_annotator", "judgements", ["annotator_id", "id"])
    op.create_table(
        "sessions",
        key("sha", sa.String),
        need("annotator_id", sa.Integer, "annotators.id"),
        need("at", sa.Double),
    )


REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation'; END $$
"""
MOVED = "new.state <> 'done' OR new.annotator_id <> old.annotator_id OR new.lease <> old.lease"
TRIGGERS = [
    *(
        (table, verb, f"no_{verb}", f"{table} is append-only", "")
        for table in ("views", "judgements")
        for verb in ("update", "delete", "truncate")
    ),
    ("slots", "update", "stay", "done slots stay done", f"old.state = 'done' AND ({MOVED})"),
    *(("slots", verb, f"no_{verb}", "slots are never removed", "") for verb in ("delete", "truncate")),
]
