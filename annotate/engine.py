"""Opening the SQLite file of labels, so that what is committed is on disk."""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from annotate.records import DataError


def open_engine(url: str) -> Engine:
    """Raises DataError where `url` names no file that survives, or its folder cannot be made."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DataError(f"{url}: not a database URL; write sqlite:///path/to/labels.db") from None
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise DataError(f"{url}: labels need a file that survives; write sqlite:///path/to/labels.db")
    try:
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{url}: cannot make its folder ({error.strerror})") from None
    engine = create_engine(parsed, connect_args={"timeout": 30}, pool_size=16, max_overflow=48)

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
