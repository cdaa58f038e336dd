"""Programs that run until told otherwise: whatever falls is started again, as systemd or Docker would.

One thread does everything: `look` is called again and again and starts what has fallen. The kernel ties each
program to this process, so nothing outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "SEUF_CHAOS"
"""A variable that every program of a run inherits, so that what is left of it can be found."""
RESTART_SECONDS = 0.3
"""Before a fallen program is started again."""
STOP_SECONDS = 20


@dataclass
class Program:
    """One program, and the process that runs it now (None: it is down, and meant to be)."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    stop_signal: int = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None
    fell_at: float | None = None
    killed: bool = False
    starts: int = 0

    def start(self) -> None:
        """Run it; its output is added to a log beside those of the others."""
        self.killed, self.fell_at = False, None
        self.starts += 1
        with (self.folder / f"{self.name}.log").open("ab") as log:
            # The parent-death signal survives the exec, and the process id stays the program's own.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *self.command],
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Of the process that runs it, if one does."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def family(self) -> list[int]:
        """The process and everything it has started, parents first."""
        return [] if self.pid is None else [self.pid, *descendants(self.pid)]


@dataclass
class Keeper:
    """The programs of one run. `fallen`: how often each ended although nobody here had ended it."""

    mark: str
    programs: dict[str, Program] = field(default_factory=dict)
    fallen: dict[str, int] = field(default_factory=dict)

    def run(self, program: Program) -> Program:
        """Start a program and keep it running."""
        program.environment = {**program.environment, MARK: self.mark}
        self.programs[program.name] = program
        program.start()
        return program

    def look(self) -> None:
        """Start again what has fallen."""
        for program in self.programs.values():
            if program.process is None or program.process.poll() is None:
                continue
            if program.fell_at is None:
                program.fell_at = time.monotonic()
                if not program.killed:
                    self.fallen[program.name] = self.fallen.get(program.name, 0) + 1
            elif time.monotonic() - program.fell_at >= RESTART_SECONDS:
                program.start()

    def kill(self, program: Program, *, family: bool = False) -> bool:
        """SIGKILL to the program, or to it and all it has started; `look` starts it again. False: it is down."""
        pids = program.family() if family else program.family()[:1]
        program.killed = bool(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def stop(self, program: Program) -> None:
        """End it in order, and leave it down."""
        process, program.process = program.process, None
        if process is None:
            return
        family = [process.pid, *descendants(process.pid)]
        process.send_signal(program.stop_signal)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """End all programs, the last one started first."""
        for program in reversed(list(self.programs.values())):
            self.stop(program)


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents before children."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def marked(mark: str) -> Iterator[int]:
    """Every process that has inherited this mark, ours or an orphan."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid
