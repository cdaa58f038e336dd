"""A store with everything a job needs, and the processes that run it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from seuf_core.method import Method
from store.artefacts import Artefacts
from store.database import Database
from store.events import Events
from store.files import Files, artefact_key
from store.ids import new_id
from store.jobs import Jobs, JobSpec, SetRef
from store.settings import Settings
from store.tables import Job
from tests.seeds import add_model, get_job
from tests.services import wait_until

ROOT = Path(__file__).parents[2]
SECRET_TEXT = "Die Katze von Frau Sommer heisst Ottilie"


@dataclass
class House:
    """One database, one artefact folder, and whatever was started on them."""

    database: Database
    settings: Settings
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def artefacts(self) -> Artefacts:
        return Artefacts.of(self.settings)

    def upload(self, text: str, purpose: str = "forget") -> SetRef:
        """A file with its bytes."""
        file_id, data = new_id("file"), text.encode()
        with self.artefacts.open_write(artefact_key(file_id)) as file:
            file.write(data)
        sha256 = hashlib.sha256(data).hexdigest()
        with self.database.write() as session:
            Files(session).create(file_id, purpose, "set.jsonl", sha256, len(data), 1, 1)
        return SetRef(file_id, sha256)

    def submit(
        self,
        forget: SetRef | None = None,
        retain: SetRef | None = None,
        path: str = "/models/tiny",
        limits: tuple[float | None, int | None] = (None, None),
        **method: Any,
    ) -> str:
        """A queued job; returns its id. `limits`: seconds, bytes of memory."""
        model_id = add_model(self.database, path)
        resolved = Method(**{"steps": 5, "seed": 7, **method}).model_dump(mode="json")
        seconds, memory = limits
        spec = JobSpec(
            model_id,
            forget or self.upload(SECRET_TEXT),
            resolved,
            7,
            retain,
            max_seconds=seconds,
            max_memory_bytes=memory,
        )
        with self.database.write() as session:
            return Jobs(session).create(spec).id

    def job(self, job_id: str) -> Job:
        return get_job(self.database, job_id)

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            Jobs(session).request_cancel(job_id)

    def events(self, job_id: str, type_: str | None = None) -> list[dict[str, Any]]:
        """The data of the job's events (of one type)."""
        with self.database.read() as session:
            found = Events(session).list(job_id, limit=10_000)
        assert [event.seq for event in found] == list(range(1, len(found) + 1))
        return [event.data for event in found if type_ in (None, event.type)]

    def wait_for(self, job_id: str, *statuses: str, seconds: float = 40) -> Job:
        """The job once it is in one of the states."""
        wait_until(
            lambda: self.job(job_id).status in statuses,
            seconds,
            f"{job_id} to be {' or '.join(statuses)}",
        )
        return self.job(job_id)

    def wait_for_pid(self, job_id: str, count: int = 1) -> dict[str, Any]:
        """What the engine (of the count-th attempt) says of itself."""
        wait_until(lambda: len(self.events(job_id, "pid")) >= count, 40, "an engine")
        return self.events(job_id, "pid")[-1]

    def start(
        self, *command: str, stderr: int | None = None, **settings: str
    ) -> subprocess.Popen[bytes]:
        """`python -m ...` with this house's settings; killed with the test."""
        environment = {**os.environ, **self.settings.environment(), **settings}
        program = [sys.executable, "-m", *command]
        process = subprocess.Popen(program, env=environment, cwd=ROOT, stderr=stderr)
        self.processes.append(process)
        return process

    def with_settings(self, **changes: Any) -> House:
        """The same house under other settings."""
        values = {**self.settings.model_dump(), **changes}
        return House(self.database, Settings.model_validate(values), self.processes)


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def is_alive(pid: int) -> bool:
    """Does the process exist (and is not a zombie)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def make_house(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., House]]:
    """A house whose engine calls the given entry (a function of tests/worker/entries.py, or
    module:function).
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    houses: list[House] = []

    def make(entry: str, **settings: Any) -> House:
        values = {
            "data_dir": tmp_path / "data",
            "database_url": database_url,
            "lease_seconds": 6,
            "heartbeat_seconds": 0.2,
            "cancel_grace_seconds": 20,
            "warm_engine": False,
            "engine_entry": entry if ":" in entry else f"tests.worker.entries:{entry}",
            **settings,
        }
        houses.append(House(database, Settings.model_validate(values)))
        return houses[-1]

    yield make
    for house in houses:
        for process in house.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
