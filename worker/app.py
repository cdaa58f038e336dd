"""The Celery lane: a message says that a job is ready, and holds nothing but its id.

The database is the truth. A message that comes twice, late or for a finished job finds nothing to claim;
one that never comes is sent again. So acknowledgement is early, and there is no result backend.
"""

import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, setup_logging, worker_process_init, worker_shutting_down
from kombu.connection import Connection
from kombu.exceptions import OperationalError

from store.database import Database
from store.settings import Settings
from telemetry import logs
from worker import telling
from worker.life import open_database, worker_id
from worker.supervisor import Supervisor
from worker.sweeps import keep_work_swept

log = logging.getLogger(__name__)

TASK = "worker.run_job"
QUEUE = "seuf"
CONNECT_SECONDS = 1
"""What the dispatcher waits for a broker: it has leases to look after meanwhile, and asks again."""
NO_BROKER = "The celery lane needs a broker. Set SEUF_BROKER_URL, or use the database lane."


def celery_app(broker_url: str) -> Celery:
    """A Celery application with our rules on this broker."""
    made = Celery("seuf", broker=broker_url or None, set_as_current=False)
    made.conf.update(
        task_default_queue=QUEUE,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        # One engine at a time. Prefork, although the task only waits for another process: the main process
        # stays free to answer `inspect ping` (the container's health check), to keep its connection to
        # Redis, and to hear SIGTERM.
        worker_pool="prefork",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        # With early acknowledgement, prefetch 1 still reserves the next message while a job runs: it would
        # wait for hours behind that job while other workers are idle.
        worker_disable_prefetch=True,
        # The child imports no torch, but on a loaded machine even that may take longer than the default of
        # four seconds, after which Celery kills it and starts over.
        worker_proc_alive_timeout=60,
        broker_connection_retry_on_startup=True,
        task_publish_retry=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
    )
    return made


app = celery_app(Settings().broker_url)

# Made before the pool forks: the main process gets SIGTERM, the child runs the job.
_stopping = multiprocessing.Event()


@setup_logging.connect  # type: ignore[untyped-decorator]
def _log(**_: Any) -> None:
    """Keeps Celery from setting up its own."""
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _need_broker(**_: Any) -> None:
    if not app.conf.broker_url:
        raise SystemExit(NO_BROKER)  # else Celery would look for RabbitMQ on this machine, for ever
    open_database(Settings()).dispose()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stop(**_: Any) -> None:
    _stopping.set()


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Run the job if it is still queued."""
    if not _supervisor().run(job_id, _stopping.is_set):
        log.info("%s is not queued any more", job_id)
    if not _stopping.is_set():
        _supervisor().prepare()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _prepare(**_: Any) -> None:
    supervisor = _supervisor()
    supervisor.prepare()
    keep_work_swept(supervisor.database, supervisor.settings)


class CeleryBroker:
    """The broker as the dispatcher sees it. ConnectionError when it cannot be reached."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def publish(self, job_id: str) -> None:
        """Tell the workers of a job."""
        with self._connected() as connection:
            self.app.send_task(TASK, args=[job_id], connection=connection)

    def is_empty(self) -> bool:
        """Does no message wait?"""
        with self._connected() as connection:
            channel: Any = connection.default_channel
            return bool(channel.queue_declare(queue=QUEUE).message_count == 0)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with self.app.connection_for_write(connect_timeout=CONNECT_SECONDS) as connection:
            try:
                yield connection
            except (*connection.connection_errors, OperationalError) as error:
                raise ConnectionError("The broker is away.") from error


@lru_cache(maxsize=1)
def _supervisor() -> Supervisor:
    """Made on first use, in the child: database connections must not cross a fork."""
    settings = Settings()
    telling.begin(settings, "seuf-worker")
    return Supervisor(Database(settings.database_url), settings, worker_id())
