"""Rows that store and worker tests start from."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from store import leases
from store.database import Database
from store.fenced import FencedJob
from store.files import Files
from store.ids import new_id
from store.jobs import Jobs, JobSpec, SetRef
from store.models import Models
from store.tables import Base, Job

TENANT = "default"


def add_model(database: Database, path: str = "/models/tiny", tenant: str = TENANT) -> str:
    """A registered model; returns its id."""
    with database.write() as session:
        name = new_id("model-name")
        return Models(session, tenant).create(name, path, "sha256:0", {"num_experts": 8}).id


def add_file(database: Database, purpose: str = "forget", tenant: str = TENANT) -> str:
    """A file's row (no bytes); returns its id."""
    with database.write() as session:
        file_id = new_id("file")
        return Files(session, tenant).create(file_id, purpose, f"{purpose}.jsonl", "0" * 64, 10, 2, 3).id


def add_job(
    database: Database,
    tenant: str = TENANT,
    model_id: str | None = None,
    metadata: dict[str, str] | None = None,
    method: dict[str, Any] | None = None,
) -> str:
    """A queued job; returns its id."""
    model_id = model_id or add_model(database, tenant=tenant)
    forget = SetRef(add_file(database, tenant=tenant), "0" * 64)
    with database.write() as session:
        spec = JobSpec(model_id, forget, method or {"steps": 3}, seed=7, metadata=metadata)
        return Jobs(session, tenant).create(spec).id


def add_running(database: Database, lease_seconds: float = 60, tenant: str = TENANT) -> FencedJob:
    """A claimed job and its fenced writers."""
    job_id = add_job(database, tenant)
    with database.write() as session:
        claim = leases.claim(session, job_id, "worker-1", lease_seconds)
    assert claim is not None
    return FencedJob(database, claim.job_id, claim.token)


def get_job(database: Database, job_id: str) -> Job:
    """The job's row as it is now, whoever's it is."""
    with database.read() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def everything(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, for tests that nothing changed."""
    with database.read() as session:
        return {
            table.name: sorted((tuple(row) for row in session.execute(select(table))), key=str)
            for table in Base.metadata.sorted_tables
        }
