"""The engine's ties to its supervisor: it dies with it, and hears when it should stop."""

import ctypes
import os
import signal
import stat
import sys
import threading
from types import FrameType

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Tie this process to the one that started it, twice over.

    The kernel's parent-death signal works even while Python is stuck in a long call, but only on Linux, and
    it is missed if the parent died before this line. The pipe on standard input closes in every case and on
    every system.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_die_when_pipe_closes, name="parent-watch", daemon=True).start()


def _die_when_pipe_closes() -> None:
    while os.read(0, 1):
        pass  # nobody writes; only the end of the pipe matters
    os.killpg(os.getpgrp(), signal.SIGKILL)


class StopFlag:
    """True once SIGTERM or SIGINT has arrived."""

    def __init__(self) -> None:
        self._set = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrived)

    def __call__(self) -> bool:
        """Has a signal arrived?"""
        return self._set.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep until a signal arrives, at most `seconds`; has one arrived?"""
        return self._set.wait(seconds)

    def _arrived(self, _number: int, _frame: FrameType | None) -> None:
        self._set.set()
