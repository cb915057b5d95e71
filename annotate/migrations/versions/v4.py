"""Researchers; rounds that are paused or closed, with rules; checks and repeats in rounds of their own."""

from alembic import op

revision, down_revision = "4", "3"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE annotators ADD COLUMN role VARCHAR DEFAULT 'annotator' NOT NULL "
        "CHECK (role in ('annotator', 'researcher'))"
    )
    op.execute(
        "ALTER TABLE rounds ADD COLUMN state VARCHAR DEFAULT 'open' NOT NULL "
        "CHECK (state in ('open', 'paused', 'closed'))"
    )
    op.execute("ALTER TABLE rounds ADD COLUMN rules JSON")
    op.execute("ALTER TABLE rounds ADD COLUMN part_of INTEGER REFERENCES rounds (id)")
    op.execute(
        "ALTER TABLE rounds ADD COLUMN purpose VARCHAR DEFAULT 'label' NOT NULL "
        "CHECK (purpose in ('label', 'check', 'repeat'))"
    )
    op.execute("ALTER TABLE tasks ADD COLUMN known JSON")
    op.execute("CREATE UNIQUE INDEX rounds_parts ON rounds (part_of, purpose)")
