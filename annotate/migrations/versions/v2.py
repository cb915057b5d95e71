"""Invitations, guidelines, and ties because neither reply is any good."""

import sqlalchemy as sa
from alembic import op

from annotate.schema import Exact

revision, down_revision = "2", "1"


def upgrade() -> None:
    op.create_table(
        "invitations",
        sa.Column("annotator_id", sa.Integer, sa.ForeignKey("annotators.id"), primary_key=True),
        sa.Column("sha", sa.String, nullable=False, unique=True),
        sa.Column("at", sa.Double, nullable=False),
        if_not_exists=True,  # late files of version 1 have it
    )
    op.create_table(
        "guidelines",
        sa.Column("sha", sa.String, primary_key=True),
        sa.Column("text", Exact, nullable=False),
    )
    both_bad = sa.CheckConstraint("NOT both_bad OR (preference IS NOT NULL AND preference = 0)")
    op.add_column(
        "judgements", sa.Column("both_bad", sa.Boolean, both_bad, nullable=False, server_default=sa.false())
    )
    op.execute("ALTER TABLE judgements ADD COLUMN guidelines VARCHAR REFERENCES guidelines (sha)")
