"""The worker that `seuf up` keeps: a process of its own, started again if it falls, stopped with us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from cli import output

if TYPE_CHECKING:
    from store.settings import Settings

_PR_SET_PDEATHSIG = 1
AGAIN_SECONDS = 2.0


class WorkerProcess:
    """`python -m worker --lane database` with the settings of this service."""

    def __init__(self, settings: Settings) -> None:
        self._grace = settings.cancel_grace_seconds + 10
        self._environment = {**os.environ, **settings.environment(), "SEUF_LANE": "database"}
        self._environment.pop("SEUF_MODEL_ROOTS", None)  # the API's alone
        self._log = settings.data_dir / "worker.log"
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="worker-keeper", daemon=True)

    def start(self) -> None:
        """Start it, and keep it running."""
        self._thread.start()

    def stop(self) -> None:
        """SIGTERM and a grace period: a running engine writes its training checkpoint in it."""
        self._stopping.set()
        self._thread.join(self._grace)
        self.kill()

    def kill(self) -> None:
        """End it at once; its engine dies with it, and the job goes on from its last training checkpoint."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "worker", "--lane", "database"],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Its own group: Ctrl-C reaches us, and we tell it; both at once would be a race.
                    start_new_session=True,
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            if self._ended(self._process):
                return
            output.say(
                f"The worker ended with code {self._process.returncode}; starting it again ({self._log})."
            )
            self._stopping.wait(AGAIN_SECONDS)

    def _ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for its end or for the order to stop; true when it ended because we said so."""
        while process.poll() is None:
            if self._stopping.wait(0.2):
                process.terminate()
                process.wait()
                return True
        return self._stopping.is_set()


def _die_with_parent() -> None:
    """Runs in the child before it becomes the worker: no worker outlives a killed `seuf up`.

    The kernel watches the thread that forked, the keeper, which lives as long as we do.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
