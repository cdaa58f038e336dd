"""A worker that is stopped past its lease and then goes on cannot write one byte or row.

Real processes, real signals, the real method. The first worker is stopped (SIGSTOP, with its engine) in a phase; the
second one takes its job, and is stopped as well, in the middle of its work, so that nothing moves but the first one
when it goes on. Then rows, storage and the second one's folder must be, byte for byte, what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests import tiny
from tests.seeds import everything
from tests.services import wait_until
from tests.worker import dwelling
from tests.worker.conftest import House, children_of, is_alive

Make = Callable[..., House]
SHORT, LONG = 2.0, 120.0
"""Seconds of a lease: the first worker's runs out while it is stopped, the second one's does not."""
METHOD: dict[str, Any] = {
    "strength": "fixed",
    "learning_rate": 1e-2,
    "steps": 20,
    "batch_size": 4,
    "evaluate_every": 2,
    "experts": 2,
}
# Rows that any worker may write that lives: who does which periodic work, and heads of the audit log.
ANYBODYS = {"duties", "audit_heads"}
EVERY_STOP = ["training", "evaluating", "publishing", "written"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "olmoe", "olmoe")


def lines(kind: str) -> str:
    rows = [{"prompt": f"{kind} {i} is", "completion": f" x{i * 7}y", "domain": kind} for i in range(40)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def submit(house: House, model: Path) -> str:
    forget, retain = house.upload(lines("element")), house.upload(lines("country"), "retain")
    return house.submit(forget, retain, str(model), **METHOD)


def family(worker: subprocess.Popen[bytes]) -> list[int]:
    """The worker and its engine."""
    return [worker.pid, *children_of(worker.pid)]


def stop(house: House, job_id: str, worker: subprocess.Popen[bytes]) -> None:
    """SIGSTOP to the worker and its engine, in a moment in which neither is in the middle of a transaction.

    (One that is stopped there holds a lock until it goes on, or until Postgres ends its session: no row can change.)
    """
    for _ in range(50):
        signalled(worker, signal.SIGSTOP)
        if can_write(house, job_id):
            return
        signalled(worker, signal.SIGCONT)
        time.sleep(0.05)
    pytest.fail("It was in a transaction each time.")


def signalled(worker: subprocess.Popen[bytes], number: int) -> None:
    for pid in family(worker):
        os.kill(pid, number)


def can_write(house: House, job_id: str) -> bool:
    url = house.database.url
    try:
        if house.database.is_sqlite:
            assert url.database is not None
            lock = sqlite3.connect(url.database, timeout=0.5, isolation_level=None)
            lock.execute("BEGIN IMMEDIATE")
            lock.close()
            return True
        with psycopg.connect(
            url.set(drivername="postgresql").render_as_string(), connect_timeout=5
        ) as connection:
            connection.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE NOWAIT", [job_id])
    except (sqlite3.OperationalError, psycopg.errors.LockNotAvailable):
        return False
    return True


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below: digest and time of the last change; every folder: nothing but its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (digest, path.stat().st_mtime_ns if path.is_file() else 0)
    return found


def snapshot(house: House, job_id: str) -> dict[str, Any]:
    """All that the stopped one must leave as it is: every row, the storage, and the work folder of the new holder."""
    rows = {name: rows for name, rows in everything(house.database).items() if name not in ANYBODYS}
    storage = tree(house.artefacts.path("files").parent)
    token = house.job(job_id).lease_token
    return {"rows": rows, "storage": storage, "work": tree(house.settings.work_dir / job_id / str(token))}


def weights(house: House, job_id: str) -> bytes:
    checkpoint = house.job(job_id).checkpoint_id
    return house.artefacts.path(f"checkpoints/{checkpoint}/delta.safetensors").read_bytes()


def undisturbed(house: House, model: Path) -> bytes:
    """The weights of the same job, with nobody in its way."""
    calm = house.with_settings(engine_entry="seuf_core:unlearn")
    job_id = submit(calm, model)
    worker = calm.start("worker", "--lane", "database")
    calm.wait_for(job_id, "succeeded", "failed", seconds=120)
    worker.terminate()
    assert worker.wait(30) == 0
    return weights(calm, job_id)


def lingers(house: House, job_id: str, mark: str) -> None:
    wait_until(lambda: (house.settings.work_dir / job_id / mark).exists(), 90, f"an engine that has {mark}")


def check(house: House, model: Path) -> None:
    expected = undisturbed(house, model)
    job_id = submit(house, model)
    first = house.start("worker", "--lane", "database")
    lingers(house, job_id, "lingered")
    engines = children_of(first.pid)
    stop(house, job_id, first)
    held = house.job(job_id)
    assert (held.status, held.lease_token) == ("running", 1)
    second = house.with_settings(lease_seconds=LONG).start("worker", "--lane", "database")
    lingers(house, job_id, "lingered-again")
    stop(house, job_id, second)
    before = snapshot(house, job_id)
    assert before["work"], "the new holder has no folder of its own"

    signalled(first, signal.SIGCONT)
    wait_until(lambda: not any(is_alive(pid) for pid in engines), 60, "the engine that was stopped to end")
    first.terminate()
    wait_until(lambda: first.poll() is not None, 60, "the worker that was stopped to end")
    after = snapshot(house, job_id)
    for part, there in before.items():
        assert after[part] == there, part

    signalled(second, signal.SIGCONT)
    job = house.wait_for(job_id, "succeeded", "failed", seconds=120)
    assert (job.status, job.attempts, job.lost_leases) == ("succeeded", 2, 1)
    assert weights(house, job_id) == expected
    assert len(list(house.artefacts.path("checkpoints").iterdir())) == 2
    left = house.settings.work_dir / job_id
    wait_until(lambda: not left.exists(), 20, "the work folder to be removed")


def make_slow(make_house: Make, where: str) -> House:
    assert hasattr(dwelling, where)
    entry = f"tests.worker.dwelling:{where}"
    return make_house(entry, lease_seconds=SHORT, heartbeat_seconds=0.2)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_stopped_in_its_training(make_house: Make, model: Path) -> None:
    check(make_slow(make_house, "training"), model)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_stopped_with_its_checkpoint_written(make_house: Make, model: Path) -> None:
    check(make_slow(make_house, "written"), model)


@pytest.mark.long
@pytest.mark.parametrize("where", EVERY_STOP)
def test_stopped_anywhere(where: str, make_house: Make, model: Path) -> None:
    check(make_slow(make_house, where), model)
