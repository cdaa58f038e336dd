"""Background work that no single job owns: the duties of worker.duties, and telling the broker of jobs.

`python -m worker.dispatcher` for the celery lane; the database lane runs the same loop beside itself,
without a broker.
"""

import logging
import math
import time
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from store.database import Database
from store.outbox import Outbox
from store.settings import Settings
from worker import telling
from worker.duties import Rota
from worker.life import StopFlag, open_database

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
"""Between two looks at the outbox: what a job waits at most before a worker hears of it."""
ASK_SECONDS = 5
"""Between two questions whether the broker has lost messages."""
LEAVE_SECONDS = 3
"""What duties under way are given to end when the loop does. They may be cut off anywhere."""
LOST_SECONDS = 30
"""A message this old is lost if the broker is empty and its job still queued: a claim takes a second."""


class Wait(Protocol):
    """Sleep, at most so many seconds; true: it is time to end."""

    def __call__(self, seconds: float, /) -> bool:
        """See above."""
        ...


class Broker(Protocol):
    """What tells workers of jobs. Raises ConnectionError when it cannot be reached."""

    def publish(self, job_id: str) -> None:
        """Tell one of the workers."""
        ...

    def is_empty(self) -> bool:
        """Does no message wait for a worker?"""
        ...


def publish_outbox(database: Database, broker: Broker) -> int:
    """Tell the broker of every job that waits in the outbox; returns how many.

    Marked after publishing: a crash in between tells a worker twice, and the second claim finds nothing. No
    transaction is open while the broker is spoken to.
    """
    with database.read() as session:
        waiting = [(message.id, message.job_id) for message in Outbox(session).pending()]
    for message_id, job_id in waiting:
        broker.publish(job_id)
        with database.write() as session:
            Outbox(session).mark_published([message_id])
    return len(waiting)


def resend_lost(database: Database, broker: Broker, older_than_seconds: float = LOST_SECONDS) -> int:
    """Reopen the messages of queued jobs that the broker does not hold any more; returns how many.

    Only an empty broker is asked about: behind a long queue a message may be hours old and still be there.
    """
    if not broker.is_empty():
        return 0
    with database.write() as session:
        lost = Outbox(session).reopen_lost(older_than_seconds)
    if lost:
        log.warning("the broker lost %d messages; sending them again", lost)
    return lost


def loop(database: Database, settings: Settings, broker: Broker | None, wait: Wait) -> None:
    """Until `wait` says so: the duties when they are due (worker.duties); with a broker also the outbox every
    PUBLISH_SECONDS and lost messages every ASK_SECONDS.

    Survives a database or a broker that is away: both are only asked again.
    """
    rota = Rota(database, settings)
    asked_at = -math.inf
    while True:
        rota.look()
        if broker is not None:
            try:
                if time.monotonic() - asked_at >= ASK_SECONDS:
                    asked_at = time.monotonic()
                    resend_lost(database, broker)
                publish_outbox(database, broker)
            except (SQLAlchemyError, OSError) as error:
                log.warning("%s; again in %.1f s", type(error).__name__, PUBLISH_SECONDS)
        if wait(PUBLISH_SECONDS):
            rota.close(LEAVE_SECONDS)
            return


def main() -> None:
    """Entry of `python -m worker.dispatcher`."""
    from worker.app import NO_BROKER, CeleryBroker, app

    settings = Settings()
    if not settings.broker_url:
        raise SystemExit(NO_BROKER)

    telling.begin(settings, "seuf-dispatcher")
    database = open_database(settings)
    stop = StopFlag()
    loop(database, settings, CeleryBroker(app), stop.wait)


if __name__ == "__main__":
    main()
