"""`python -m migrations upgrade|downgrade|check`: the schema of the database that SEUF_DATABASE_URL names."""

import argparse
import logging
import sys

from store import migrate
from store.database import Database
from store.settings import Settings
from telemetry import logs


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when done; `check` exits with 1 when migrations are missing."""
    parser = argparse.ArgumentParser(prog="python -m migrations", description=__doc__)
    parser.add_argument("act", choices=("upgrade", "downgrade", "check"))
    parser.add_argument("revision", nargs="?", help="default: head; required for downgrade")
    given = parser.parse_args(arguments)
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    logging.getLogger("alembic").setLevel(logging.INFO)  # each migration that runs; elsewhere it has nothing to say
    url = settings.database_url
    if given.act == "upgrade":
        migrate.upgrade(url, given.revision or "head")
    elif given.act == "downgrade":
        if given.revision is None:
            parser.error("downgrade needs a revision, since it deletes data (base: everything)")
        migrate.downgrade(url, given.revision)
    elif not migrate.at_head(Database(url)):
        print("The database lacks migrations. Run: python -m migrations upgrade", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
