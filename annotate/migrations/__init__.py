"""The label database made new, or brought to the present schema: one revision of Alembic for each version.

To change the schema: change `annotate.schema`, add 1 to its VERSION, and write versions/vN.py, which makes
version N - 1 into the same (tests/test_migrations.py compares). Revisions add; labels stay as they are.
"""

import uuid
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select, text, update

from annotate.records import DataError
from annotate.schema import VERSION, Base, Database


def ready(x: Connection, name: str) -> str:
    """Id of the database, made or upgraded in the caller's transaction. DataError where it is too new."""
    if _version(x) != VERSION:
        if x.dialect.name != "sqlite":  # which lets in one at a time
            x.execute(text("SELECT pg_advisory_xact_lock(hashtext('prefloop'))"))
        version = _version(x)  # another process may have been faster
        if version is None:
            Base.metadata.create_all(x)
            x.execute(insert(Database), {"id": uuid.uuid4().hex, "version": VERSION})
        elif version > VERSION:
            raise DataError(f"{name}: version {version} of the label database, this prefloop needs {VERSION}")
        else:
            upgrade(x, version)
    return x.execute(select(Database.id)).scalar_one()


def upgrade(x: Connection, version: int | None, to: int = VERSION) -> None:
    """From a version (None: nothing is there) to another, inside the caller's transaction."""
    from alembic import command  # 0.1 s, and hardly ever needed
    from alembic.config import Config

    config = Config(attributes={"connection": x})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    if version is not None:
        command.stamp(config, str(version))  # the number we keep is the one that counts
    command.upgrade(config, str(to))
    x.execute(update(Database).values(version=to))


def _version(x: Connection) -> int | None:
    return x.execute(select(Database.version)).scalar() if inspect(x).has_table("database") else None
