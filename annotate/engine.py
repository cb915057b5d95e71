"""Opening the database of labels, so that what is committed is on disk."""

import re
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from annotate.records import DataError

WRITE = "write sqlite:///path/to/labels.db or postgresql+psycopg://user@host/database"


def open_engine(url: str) -> Engine:
    """Raises DataError where `url` names nothing that survives, or what it needs is not there."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise DataError(f"{printable(url)}: not a database URL; {WRITE}") from None
    if parsed.drivername == "postgresql+psycopg":
        return _postgresql(parsed)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise DataError(f"{printable(url)}: labels need a database that survives; {WRITE}")
    try:
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{url}: cannot make its folder ({error.strerror})") from None
    return _sqlite(parsed)


def printable(url: str) -> str:
    """The URL without its password."""
    url = re.sub(r"^([^:]*:/*[^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


def fault(error: Exception) -> str:
    """What the database said, in one line, and what to look at."""
    said = str(error.orig if isinstance(error, DBAPIError) else error).splitlines()
    first = said[0] if said else type(error).__name__
    return f"{first}; is it a label database, can it be reached, and has its disk room?"


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": 30}, pool_size=16, max_overflow=48)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(x: Connection) -> None:
        # The write lock up front: a transaction that reads first and writes later can deadlock with another.
        x.exec_driver_sql("BEGIN" if x.get_execution_options().get("read") else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: URL) -> Engine:
    # Locks are taken row by row (annotate.queue), each statement seeing what was committed before it.
    # A server lets in a hundred connections, of all processes together; threads wait for one of these.
    options = {"isolation_level": "READ COMMITTED", "pool_size": 12, "max_overflow": 0}
    try:
        engine = create_engine(url, **options, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    except ImportError:
        message = "PostgreSQL needs the package psycopg: pip install 'prefloop[postgresql]'"
        raise DataError(f"{printable(url.render_as_string())}: {message}") from None

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        # Whatever the server or the role has as default; what waits for more than the disk is left as it is.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') = 'off'"
        )
        connection.commit()

    return engine
