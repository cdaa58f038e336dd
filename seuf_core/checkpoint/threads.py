"""Several files at once: each worked on in a thread, progress and errors in the caller's. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

from seuf_core.checkpoint.digests import Done

MOST_THREADS = 4  # more of them wait for one disk
_TELL_BYTES = 32 << 20

Task = Callable[[Done], str]


class _StoppedError(Exception):
    """Another task failed, or the caller wants no more."""


def in_threads(tasks: Sequence[Task], done: Done) -> list[str]:
    """The result of each task. Where one raises, or `done` does, the others stop within a piece, and that is raised.

    `done` is called in this thread with the bytes the tasks report: every 32 MiB of a task, and at its end.
    """
    said: SimpleQueue[int | None] = SimpleQueue()
    stop = Event()

    def act(task: Task) -> str:
        teller = _Teller(said, stop)
        try:
            teller.add(0)
            result = task(teller.add)
            teller.flush()
        except BaseException:
            stop.set()
            raise
        else:
            return result
        finally:
            said.put(None)

    with ThreadPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1, MOST_THREADS))) as pool:
        try:
            futures = [pool.submit(act, task) for task in tasks]
            ended = 0
            while ended < len(tasks):
                size = said.get()
                if size is None:
                    ended += 1
                else:
                    done(size)
        except BaseException:
            stop.set()
            raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
        raise error  # the one that stopped the others
    return [future.result() for future in futures]


class _Teller:
    """What a task calls: passes the bytes on now and then, and ends the task where it is to stop."""

    def __init__(self, said: SimpleQueue[int | None], stop: Event) -> None:
        self._said, self._stop, self._kept = said, stop, 0

    def add(self, size: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._kept += size
        if self._kept >= _TELL_BYTES:
            self.flush()

    def flush(self) -> None:
        self._said.put(self._kept)
        self._kept = 0
