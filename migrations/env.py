"""Alembic's environment: runs the migrations on the address that store.migrate hands over."""

from typing import Any

from alembic import context
from sqlalchemy import Connection, event, text

from store.database import Database
from store.tables import Base

# Any number that nothing else in the database locks: replicas that start together migrate one after the
# other.
MIGRATION_LOCK = 2411_18797


def _run() -> None:
    database = Database(context.config.attributes["url"])
    if database.is_sqlite:
        event.listen(database.writing_engine, "connect", _without_foreign_keys)
    try:
        # The writing engine: SQLite takes its write lock first, so two starters cannot both create the
        # tables.
        with database.writing_engine.connect() as connection:
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                render_as_batch=database.is_sqlite,
                transactional_ddl=True,
            )
            with context.begin_transaction():
                if not database.is_sqlite:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
                context.run_migrations()
                if database.is_sqlite:
                    _check_foreign_keys(connection)
    finally:
        database.dispose()


def _without_foreign_keys(connection: Any, _record: Any) -> None:
    """SQLite changes a column by making the table anew, and would not drop one that others refer to.

    Off before the transaction, checked at its end: the way SQLite's own documentation has it.
    """
    connection.execute("PRAGMA foreign_keys = OFF")


def _check_foreign_keys(connection: Connection) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise RuntimeError(f"The migration would leave rows that refer to nothing: {broken[:5]}")


_run()
