"""How often a round was opened, which says whether a place in its queue still holds."""

from alembic import op

revision, down_revision = "5", "4"


def upgrade() -> None:
    op.execute("ALTER TABLE rounds ADD COLUMN opened INTEGER DEFAULT '0' NOT NULL")
