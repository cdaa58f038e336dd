"""What a process is called, and its ties to others: an engine dies with its supervisor, and hears when to stop."""

import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from queue import SimpleQueue
from types import FrameType

from store.database import AWAY, Database
from store.errors import SchemaMismatchError
from store.settings import Settings

log = logging.getLogger(__name__)

AGAIN_SECONDS = 2
"""Between two tries at a database that does not answer yet."""
_PR_SET_PDEATHSIG = 1


def worker_id() -> str:
    """Who this process is, for people: host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def open_database(settings: Settings) -> Database:
    """The database, once it answers. SystemExit, with what to do, when it has not the tables of this version."""
    from store import migrate  # alembic, which an engine does without

    database = Database(settings.database_url)
    while True:
        try:
            migrate.require_head(database)
        except SchemaMismatchError as error:
            raise SystemExit(f"error: {error}") from None
        except AWAY as error:
            log.warning("database away (%s); again in %d s", type(error).__name__, AGAIN_SECONDS)
            time.sleep(AGAIN_SECONDS)
        else:
            return database


def die_with_parent() -> SimpleQueue[str]:
    """Tie this process to the one that started it, twice over; returns the lines that one sends.

    The kernel's parent-death signal works even while Python is stuck in a long call, but only on Linux, and
    it is missed if the parent died before this line. The pipe on standard input closes in every case and on
    every system.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), name="parent", daemon=True).start()
    return lines


def _listen(lines: SimpleQueue[str]) -> None:
    with open(0) as pipe:
        for line in pipe:
            lines.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class StopFlag:
    """True once SIGTERM or SIGINT has arrived.

    A pipe that gets a byte, which nobody reads, and no threading.Event: the handler runs in the main thread
    between any two of its instructions, so also while that thread holds the event's lock in `wait`, and would
    then wait for it for ever.
    """

    def __init__(self) -> None:
        self._arrivals, self._told = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrived)

    def __call__(self) -> bool:
        """Has a signal arrived?"""
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Sleep until a signal arrives, at most `seconds`; has one arrived? Any thread may ask."""
        waiting = select.poll()  # its own for each call: one that two threads share refuses the second
        waiting.register(self._arrivals, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))

    def _arrived(self, _number: int, _frame: FrameType | None) -> None:
        os.write(self._told, b"!")
