"""Bring a database to the newest schema, from wherever the package is installed."""

from functools import lru_cache
from importlib.util import find_spec

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from store.database import Database
from store.errors import SchemaMismatchError


def upgrade(database_url: str, revision: str = "head") -> None:
    """Run every migration up to `revision` that the database lacks.

    Safe when several processes start it at once.
    """
    command.upgrade(alembic_config(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Undo migrations down to `revision` ("base": all of them, with the data in their tables)."""
    command.downgrade(alembic_config(database_url), revision)


def at_head(database: Database) -> bool:
    """Has the database every migration this code knows of, and no other?"""
    return _current(database) == _head()


def require_head(database: Database) -> None:
    """SchemaMismatchError unless `at_head`. Whoever reads or writes rows calls it before anything else."""
    current = _current(database)
    if current == _head():
        return
    if current is not None and current not in _known():
        raise SchemaMismatchError(
            f"The database is at migration {current}, which this version does not know: a newer one migrated it.",
            "Start the newer version.",
        )
    raise SchemaMismatchError(
        f"The database is at migration {current or 'none'}, and this version works with {_head()}.",
        "Run `python -m migrations upgrade` (docker compose does: the service migrate), then start again.",
    )


def _current(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}


@lru_cache(maxsize=1)
def _head() -> str | None:
    """The newest revision that this code knows of; read from its files once."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def alembic_config(database_url: str | None = None) -> Config:
    """What alembic needs to find the migrations, and the database if one is given."""
    # Found, not imported: the store knows nothing of the migrations, which know its tables.
    spec = find_spec("migrations")
    assert spec is not None
    assert spec.submodule_search_locations
    config = Config()
    config.set_main_option("script_location", spec.submodule_search_locations[0])
    config.attributes["url"] = database_url
    return config
