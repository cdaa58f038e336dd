"""`python -m worker.alive`: ends with 0 while a dispatcher is at its duties. For the health check of its container."""

import sys

from store import census
from store.database import Database, utc_now
from store.settings import Settings


def main() -> int:
    """Entry; says on standard error what is wrong."""
    with Database(Settings().database_url).read() as session:
        silent = census.dispatcher_silent(session, utc_now(session))
    if silent is None or silent > census.SILENT_SECONDS:
        seen = "none was ever seen" if silent is None else f"none has been seen for {silent:.0f} s"
        print(f"No dispatcher: {seen}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
