"""Alembic's environment: runs the migrations on the address that store.migrate hands over."""

from alembic import context
from sqlalchemy import text

from store.database import Database
from store.tables import Base

# Any number that nothing else in the database locks: replicas that start together migrate one after the
# other.
MIGRATION_LOCK = 2411_18797


def _run() -> None:
    database = Database(context.config.attributes["url"])
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
    finally:
        database.dispose()


_run()
