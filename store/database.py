"""One database, SQLite or Postgres: its engine, and the two kinds of transaction that everything else
uses.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

AWAY = (OperationalError, InterfaceError, InternalError)
"""What a database raises that cannot be reached, is restarting, or has ended our session: to be tried again."""
IDLE_SECONDS = 1
"""A connection that nobody has used for this long is asked whether it is still good."""
SQLITE_BUSY_MS = 30_000
"""How long a SQLite writer waits for the one before it.

Writes take milliseconds; half a minute means a stuck process.
"""


STANDSTILL_SECONDS = 30
"""After this long inside a transaction without a word Postgres ends the session.

A process that is stopped there would hold its job's row, and so its lease, for as long as it stands still.
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
        if self.is_sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        # Two pools: what a connection may do is said once, when it is opened, and not at every use of it.
        self.engine = _reading_engine(parsed)
        self.writing_engine = _engine(parsed)
        if self.is_sqlite:
            event.listen(self.engine, "begin", _begin_sqlite)
            event.listen(self.writing_engine, "begin", _begin_sqlite_writing)
        else:
            event.listen(self.writing_engine, "connect", _let_go_in_time)
        self._read = sessionmaker(self.engine, expire_on_commit=False)
        self._write = sessionmaker(self.writing_engine, expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A look: the database refuses a write in it. Rows stay usable after it.

        On Postgres each statement sees what is committed by then, as in any transaction there (read committed).
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
        self.writing_engine.dispose()


def utc_now(session: Session) -> datetime:
    """The clock leases are compared by: the database's own, so that machines whose clocks differ still
    agree.
    """
    if session.get_bind().dialect.name == "postgresql":
        at: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return at.astimezone(UTC)
    return datetime.now(UTC)


def _engine(url: URL, **options: Any) -> Engine:
    # hide_parameters: an error that is logged quotes no row's values.
    engine = create_engine(url, hide_parameters=True, **options)
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    else:
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", partial(_ping_if_idle, engine))
    return engine


def _reading_engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = _engine(url)
        event.listen(engine, "connect", _only_read_sqlite)
        return engine
    # A statement is a transaction of its own: no round trips to begin and to end one, which take longer than most
    # of our queries.
    engine = _engine(url, isolation_level="AUTOCOMMIT")
    event.listen(engine, "connect", _only_read_postgres)
    return engine


def _note_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _ping_if_idle(
    engine: Engine, connection: Any, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection
) -> None:
    """Is a connection that lay idle still good? A restarted Postgres then costs a reconnect, not a failed request.

    (SQLAlchemy's own pool_pre_ping asks at every use.)
    """
    if time.monotonic() - record.info.get("used", math.inf) < IDLE_SECONDS:
        return
    try:
        engine.dialect.do_ping(connection)
    except Exception as error:
        raise DisconnectionError from error


def _only_read_postgres(connection: Any, _record: Any) -> None:
    connection.execute("SET default_transaction_read_only = on")


def _let_go_in_time(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{STANDSTILL_SECONDS}s'")
    connection.commit()


def _only_read_sqlite(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA query_only = ON")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the begin hook below begins; the driver must not begin by itself
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_sqlite_writing(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
