"""The database lane: one machine, no broker. Asks the database for the oldest queued job and runs it."""

import logging
import threading
from collections.abc import Callable

from store.database import AWAY, Database
from store.settings import Settings
from worker import dispatcher
from worker.life import worker_id
from worker.supervisor import Supervisor
from worker.sweeps import keep_work_swept

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
"""Between two looks at an empty queue: one indexed query."""


def run_database_lane(database: Database, settings: Settings, wait: Callable[[float], bool]) -> None:
    """Run jobs one after the other until `wait` (sleep at most so long; true: end) says so."""
    supervisor = Supervisor(database, settings, worker_id())
    beside = threading.Thread(
        target=dispatcher.loop, args=(database, settings, None, wait), name="dispatcher", daemon=True
    )
    beside.start()
    keep_work_swept(database, settings)
    log.info("database lane %s ready", supervisor.worker_id)
    while not wait(0):
        supervisor.prepare()
        try:
            took = supervisor.run(None, lambda: wait(0))
        except AWAY as error:
            log.warning("database away (%s)", type(error).__name__)
            took = False
        if not took:
            wait(IDLE_SECONDS)
    supervisor.close()
    beside.join()
