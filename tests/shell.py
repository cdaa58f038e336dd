"""The `seuf` command as a user has it: processes, and a home folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving import lines_of


@dataclass(frozen=True)
class Shell:
    """Runs `seuf` with a home folder of its own."""

    home: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Only what a fresh account has: no SEUF_ variable of the developer's reaches the tests."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SEUF_")}
        return {
            **clean,
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "HOME": str(self.home),
            "COLUMNS": "160",
            "PYTHONPATH": str(Path.cwd()),  # this checkout, whatever is installed
        }

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "cli.main", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.home,
            env=self.environment | environment,
        )

    def json(self, *arguments: object) -> dict[str, object]:
        """The JSON of a command that must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """`seuf up`, in the background."""
        command = ["up", "--data-dir", "data", "--port", "0", *map(str, arguments)]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
            env=self.environment,
        )
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        """End what a failed test left running, workers with it."""
        for process in self.started:
            workers = workers_of(process.pid) if process.poll() is None else []
            process.kill()
            for worker in workers:
                os.kill(worker, signal.SIGKILL)


def stop(process: subprocess.Popen[str]) -> str:
    """SIGINT, as Ctrl-C sends it; returns what was said on stderr."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return said


def workers_of(parent: int) -> list[int]:
    """Process ids of the living workers of a `seuf up`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, its_parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it ended while we looked
        if int(its_parent) == parent and state != "Z" and "worker" in command:
            found.append(int(entry.name))
    return found


def write_sets(folder: Path) -> None:
    """forget.jsonl, retain.jsonl and evaluation.jsonl."""
    for purpose in ("forget", "retain", "evaluation"):
        (folder / f"{purpose}.jsonl").write_text("\n".join(lines_of(purpose, 24)) + "\n")
