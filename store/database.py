"""One database, SQLite or Postgres: its engine, and the two kinds of transaction that everything else
uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, func, make_url, select
from sqlalchemy.orm import Session, sessionmaker

SQLITE_BUSY_MS = 30_000
"""How long a SQLite writer waits for the one before it.

Writes take milliseconds; half a minute means a stuck process.
"""


class Database:
    """An engine and its sessions. Make one per process (never carry it over a fork)."""

    def __init__(self, url: str) -> None:
        """`url`: sqlite:///path or postgresql://user@host/name (psycopg 3 whatever driver is left out)."""
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.url = parsed
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        # pool_pre_ping: a restarted Postgres costs one reconnect instead of one failed request per pooled
        # connection.
        # hide_parameters: an error that is logged quotes no row's values.
        self.engine = create_engine(parsed, pool_pre_ping=not self.is_sqlite, hide_parameters=True)
        if self.is_sqlite:
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        # The same pool under an option that the begin hook above reads.
        self.writing_engine = self.engine.execution_options(writing=True)
        self._read = sessionmaker(self.engine, expire_on_commit=False)
        self._write = sessionmaker(self.writing_engine, expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only looks: rolled back at the end, whatever was done in it.

        Rows stay usable after it.
        """
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits when the block ends and rolls back when it raises.

        SQLite takes its write lock at once (BEGIN IMMEDIATE): a transaction that reads first and writes
        later could otherwise fail half way, because SQLite cannot upgrade a stale read. So keep the block
        short and do no IO in it.
        """
        with self._write.begin() as session:
            yield session

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def utc_now(session: Session) -> datetime:
    """The clock leases are compared by: the database's own, so that machines whose clocks differ still
    agree.
    """
    if session.get_bind().dialect.name == "postgresql":
        at: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return at.astimezone(UTC)
    return datetime.now(UTC)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the begin hook below begins; the driver must not begin by itself
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
