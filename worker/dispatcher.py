"""Background work that no single job owns: telling the broker of jobs, taking jobs from silent workers.

`python -m worker.dispatcher` for the celery lane; the database lane runs the same loop beside itself, without
a broker.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from store import leases
from store.database import Database
from store.outbox import Outbox
from store.settings import Settings
from worker.life import StopFlag

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
"""Between two looks at the outbox: what a job waits at most before a worker hears of it."""
RELEASE_SECONDS = 5
"""Between two looks for expired leases, which take a minute to expire."""


class Wait(Protocol):
    """Sleep, at most so many seconds; true: it is time to end."""

    def __call__(self, seconds: float, /) -> bool:
        """See above."""
        ...


def publish_outbox(database: Database, publish: Callable[[str], None]) -> int:
    """Tell the broker of every job that waits in the outbox; returns how many.

    Marked after publishing: a crash in between tells a worker twice, and the second claim finds nothing. No
    transaction is open while the broker is spoken to.
    """
    with database.read() as session:
        waiting = [(message.id, message.job_id) for message in Outbox(session).pending()]
    for message_id, job_id in waiting:
        publish(job_id)
        with database.write() as session:
            Outbox(session).mark_published([message_id])
    return len(waiting)


def release_expired(database: Database) -> None:
    """Jobs of silent workers go back to the queue, or end."""
    with database.write() as session:
        released = [(job.id, job.status) for job in leases.release_expired(session)]
    for job_id, status in released:
        log.warning("%s: its lease expired; now %s", job_id, status)


def loop(database: Database, publish: Callable[[str], None] | None, wait: Wait) -> None:
    """Until `wait` says so: the outbox every PUBLISH_SECONDS, expired leases every RELEASE_SECONDS.

    Without `publish` (no broker) only the leases.

    Survives a database or a broker that is away: both are only asked again.
    """
    pause = PUBLISH_SECONDS if publish else RELEASE_SECONDS
    rounds = max(1, round(RELEASE_SECONDS / pause))
    turn = 0
    while True:
        try:
            if turn % rounds == 0:
                release_expired(database)
            if publish is not None:
                publish_outbox(database, publish)
        except (SQLAlchemyError, OSError) as error:
            log.warning("%s; again in %.1f s", type(error).__name__, pause)
        turn += 1
        if wait(pause):
            return


def main() -> None:
    """Entry of `python -m worker.dispatcher`."""
    from worker.app import publish

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stop = StopFlag()
    loop(Database(Settings().database_url), publish, stop.wait)


if __name__ == "__main__":
    main()
