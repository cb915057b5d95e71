"""Forms, and answers besides a preference."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "3", "2"


def upgrade() -> None:
    op.create_table(
        "forms",
        sa.Column("sha", sa.String, primary_key=True),
        sa.Column("form", sa.String, nullable=False),
    )
    op.execute("ALTER TABLE judgements ADD COLUMN answers JSON")
    op.execute("ALTER TABLE judgements ADD COLUMN form VARCHAR REFERENCES forms (sha)")
