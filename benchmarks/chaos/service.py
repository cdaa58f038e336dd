"""One whole service on one lane: its processes, its address and key, and what its database says of the jobs."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import httpx
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.chaos import parts, receiver
from benchmarks.chaos.keeper import Keeper, Program
from store.database import Database
from store.settings import Settings
from store.tables import Job
from store.transitions import Status

Lane = Literal["celery", "database"]
ROOT: Final = Path(__file__).parents[2]
DISK_MIB: Final = 256
LEASE_SECONDS: Final = 3.0
HEARTBEAT_SECONDS: Final = 0.5
MAX_ATTEMPTS: Final = 100
"""Each attempt that chaos ends counts; a job of chaos may have many more than one of real life."""


@dataclass(frozen=True)
class JobState:
    """A job as its row says."""

    id: str
    status: Status
    phase: str | None
    supervisor: int | None
    """Process id of its worker's supervisor, while one holds it."""
    token: int
    attempts: int
    error_code: str | None
    checkpoint_id: str | None


@dataclass
class Service:
    """API, workers and what they stand on, all on this machine."""

    lane: Lane
    folder: Path
    disk: Path
    has_own_disk: bool
    url: str
    environment: dict[str, str]
    keeper: Keeper
    database: Database
    ports: dict[str, int]
    key: str = ""

    def settings(self) -> Settings:
        """Those of its processes, with no patience for orphans: to be used at rest, when nobody is writing one."""
        given = {name.removeprefix("SEUF_").lower(): value for name, value in self.environment.items()}
        known = {name: value for name, value in given.items() if name in Settings.model_fields}
        return Settings.model_validate({**known, "orphan_grace_seconds": 0.5})

    @property
    def inbox(self) -> Path:
        """What the receiver of webhooks has got; see receiver.received."""
        return self.folder / "received.jsonl"

    @property
    def workers(self) -> list[Program]:
        """The programs that run jobs."""
        return [program for name, program in self.keeper.programs.items() if name.startswith("worker")]

    def worker_of(self, job: JobState) -> Program | None:
        """The program whose supervisor holds the job."""
        held = (worker for worker in self.workers if job.supervisor in worker.family())
        return next(held, None)

    def http(self) -> httpx.Client:
        """A client that carries the key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=20)

    def jobs(self) -> dict[str, JobState] | None:
        """Every job; None while the database is away."""
        try:
            with self.database.read() as session:
                return {job.id: _state(job) for job in session.scalars(select(Job))}
        except SQLAlchemyError:
            return None

    def answers(self, path: str = "/readyz") -> bool:
        """Does the API say that it is ready?"""
        try:
            return httpx.get(f"{self.url}{path}", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def _state(job: Job) -> JobState:
    supervisor = int(job.lease_worker.rsplit(":", 1)[1]) if job.lease_worker else None
    return JobState(
        job.id,
        job.status,
        job.phase,
        supervisor,
        job.lease_token,
        job.attempts,
        job.error_code,
        job.checkpoint_id,
    )


@contextmanager
def service(lane: Lane, folder: Path) -> Iterator[Service]:
    """A service that answers, on its own disk, with two workers; all of it ends with the block."""
    folder.mkdir(parents=True)
    with parts.small_disk(folder / "disk", DISK_MIB) as has_own_disk:
        ports = {name: parts.free_port() for name in ("api", "postgres", "redis", "receiver")}
        environment = _environment(lane, folder, ports)
        keeper = Keeper(secrets.token_hex(8))
        found = Service(
            lane,
            folder,
            folder / "disk",
            has_own_disk,
            f"http://127.0.0.1:{ports['api']}",
            environment,
            keeper,
            Database(environment["SEUF_DATABASE_URL"]),
            ports,
        )
        try:
            _start(found)
            yield found
        finally:
            found.database.dispose()
            keeper.stop_all()


def _environment(lane: Lane, folder: Path, ports: dict[str, int]) -> dict[str, str]:
    on_postgres = f"postgresql://postgres@127.0.0.1:{ports['postgres']}/seuf"
    given = {
        "DATA_DIR": str(folder / "disk"),
        "DATABASE_URL": on_postgres if lane == "celery" else f"sqlite:///{folder}/disk/seuf.db",
        "BROKER_URL": f"redis://127.0.0.1:{ports['redis']}/0" if lane == "celery" else "",
        "LANE": lane,
        "SECRET": secrets.token_urlsafe(32),
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
        "CANCEL_GRACE_SECONDS": "20",
        "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
        "WEBHOOK_HTTP": "true",
        "WEBHOOK_PORTS": str(ports["receiver"]),
        "WEBHOOK_ALLOW": "127.0.0.0/8",
        "WEBHOOK_TIMEOUT_SECONDS": "2",
        "WEBHOOK_RETRY_SECONDS": ",".join(["1"] * 3 + ["3"] * 10 + ["10"] * 10),
    }
    # One thread an engine: the weights are compared bit by bit, and two engines share two cores.
    ours = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEUF_")}
    return {**clean, **ours, **{f"SEUF_{name}": value for name, value in given.items()}}


def _start(service: Service) -> None:
    folder, keeper, ports = service.folder, service.keeper, service.ports
    if service.lane == "celery":
        keeper.run(parts.postgres(folder, ports["postgres"]))
        keeper.run(parts.redis_server(folder, ports["redis"]))
        parts.wait_for(lambda: parts.postgres_answers(ports["postgres"]), "Postgres")
        parts.create_database(ports["postgres"], "seuf")
        parts.wait_for(lambda: parts.redis_answers(ports["redis"]), "Redis")
    _once(service, "migrations", "upgrade")
    service.key = json.loads(_once(service, "cli.main", "keys", "create", "--name", "chaos", "--json"))["key"]
    programs = {"api": ["uvicorn", "api.main:app", "--port", str(ports["api"]), "--log-level", "warning"]}
    if service.lane == "celery":
        programs["dispatcher"] = ["worker.dispatcher"]
    programs |= {f"worker-{n}": ["worker", "--lane", service.lane] for n in (1, 2)}
    for name, command in programs.items():
        keeper.run(Program(name, [sys.executable, "-m", *command], service.environment, folder))
    parts.wait_for(service.answers, "the API")
    _listen(service)


def _listen(service: Service) -> None:
    """A receiver of webhooks that is told of every change of a job."""
    port = str(service.ports["receiver"])
    with service.http() as http:
        hook = http.post("/webhooks", json={"url": f"http://127.0.0.1:{port}/"}).raise_for_status().json()
    command = [sys.executable, "-m", "benchmarks.chaos.receiver", port, str(service.inbox)]
    environment = {**service.environment, receiver.SECRET: hook["secret"]}
    service.keeper.run(Program("receiver", command, environment, service.folder))


def _once(service: Service, *command: str) -> str:
    """A command that ends by itself; its output."""
    run = [sys.executable, "-m", *command]
    done = subprocess.run(run, env=service.environment, cwd=service.folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
