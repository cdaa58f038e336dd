"""Publishing: the folder first, then the row; nothing half-written is ever a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from store import leases
from store.artefacts import Artefacts
from store.checkpoints import Checkpoints
from store.database import Database
from store.fenced import FencedJob
from store.settings import Settings
from store.tables import Job
from tests.worker.conftest import House
from tests.worker.test_supervisor import supervise
from worker.engine import Engine
from worker.telling import assignment

Make = Callable[..., House]


class Disconnecting(Database):
    """A database that goes away at the given write: before its commit, or after it and before it could say
    so.
    """

    lost_write: int | None = None
    after_commit = False

    @contextmanager
    def write(self) -> Iterator[Session]:
        if self.lost_write is not None:
            self.lost_write -= 1
        lost = self.lost_write == 0
        with super().write() as session:
            yield session
            if lost and not self.after_commit:
                raise OperationalError("COMMIT", None, Exception("server closed the connection"))
        if lost:
            raise OperationalError("COMMIT", None, Exception("server closed the connection"))


def engine_of(house: House, job_id: str) -> tuple[Engine, Disconnecting]:
    with house.database.write() as session:
        claim = leases.claim(session, job_id, "worker-1", 60)
        assert claim is not None
        given = assignment(session, claim)
    engine = Engine(house.settings, given, lambda: False)
    database = Disconnecting(house.settings.database_url)
    engine.database, engine.job = database, FencedJob(database, claim.job_id, claim.token)
    return engine, database


def count_writes(house: House) -> int:
    """How many transactions the job of `works` with one step takes; the last is the publishing one."""
    engine, database = engine_of(house, house.submit(steps=1))
    database.lost_write = 1_000_000
    assert engine.run() == 0
    return 1_000_000 - database.lost_write


@pytest.mark.parametrize("after_commit", [False, True])
def test_the_last_commit_fails_once(make_house: Make, after_commit: bool) -> None:
    house = make_house("works")
    last = count_writes(house)
    job_id = house.submit(steps=1)
    engine, database = engine_of(house, job_id)
    database.lost_write, database.after_commit = last, after_commit
    assert engine.run() == 0
    assert database.lost_write is not None
    assert database.lost_write <= 0
    job = house.job(job_id)
    assert (job.status, job.error_code) == ("succeeded", None)
    assert house.artefacts.exists(f"checkpoints/{job.checkpoint_id}/given.json")
    assert len(list(house.artefacts.path("checkpoints").iterdir())) == 2


def test_whoever_lost_the_lease_publishes_nothing(make_house: Make) -> None:
    house = make_house("loses_its_lease")
    job_id = house.submit()
    supervise(house, job_id)
    job = house.job(job_id)
    assert (job.status, job.lease_worker, job.checkpoint_id) == ("running", "worker-2", None)
    with house.database.read() as session:
        assert Checkpoints(session).list().data == []
    assert not house.artefacts.exists("checkpoints")  # not even for a moment


class LosesTheLease(Artefacts):
    """Another worker gets the job right after the folder has its name."""

    named: str | None = None

    def put_folder(self, folder: Path, key: str) -> None:
        super().put_folder(folder, key)
        assert self.exists(key)
        self.named = key
        with Database(Settings().database_url).write() as session:
            session.execute(update(Job).values(lease_token=Job.lease_token + 1, lease_worker="worker-2"))


def test_a_folder_whose_row_comes_too_late_is_deleted(make_house: Make, monkeypatch: Any) -> None:
    house = make_house("works")
    job_id = house.submit(steps=1)
    monkeypatch.setenv("SEUF_DATABASE_URL", house.settings.database_url)
    engine, _ = engine_of(house, job_id)
    engine.artefacts = LosesTheLease(house.settings.artefacts_url)
    assert engine.run() == 0
    assert engine.artefacts.named is not None
    assert not house.artefacts.exists(engine.artefacts.named)
    job = house.job(job_id)
    assert (job.status, job.lease_worker, job.checkpoint_id) == ("running", "worker-2", None)
