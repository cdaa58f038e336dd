"""What must hold when everything has ended: looked up in database, storage and processes, not in what was planned."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.chaos import weights
from benchmarks.chaos.orders import DISK_FULL, Order
from benchmarks.chaos.receiver import received
from benchmarks.chaos.service import MAX_ATTEMPTS, Service
from store.tables import Checkpoint, Event, File, Job, OutboxMessage
from store.transitions import FINAL, TRANSITIONS, Status

# What a breach of each rule is called in the figures.
RULES: Final = ("lost", "doubled", "wrong_state", "other_weights", "orphans", "untold", "unsettled")


@dataclass
class Verdict:
    """Each breach with its rule, and how many jobs ended in which state."""

    breaches: list[tuple[str, str]] = field(default_factory=list)
    ended: dict[Status, int] = field(default_factory=dict)
    attempts: list[int] = field(default_factory=list)
    compared: int = 0

    def breach(self, rule: str, what: str) -> None:
        """Something that must not be."""
        assert rule in RULES
        self.breaches.append((rule, what))

    def count(self, rule: str) -> int:
        """Breaches of one rule."""
        return sum(one == rule for one, _ in self.breaches)


def judge(service: Service, orders: Sequence[Order], run: str, undisturbed: Mapping[str, str]) -> Verdict:
    """Everything that must hold, at rest.

    Args:
        undisturbed: of each spec, the digest of the weights (see weights.digest) of a run that nobody touched.
    """
    found = Verdict()
    with service.database.read() as session:
        rows = [job for job in session.scalars(select(Job)) if job.meta.get("run") == run]
        for order in orders:
            _order(found, order, [job for job in rows if job.meta["order"] == str(order.number)])
        for job in rows:
            _events(found, session, job)
            _row(found, job)
        _weights(found, session, service, rows, orders, undisturbed)
        _storage(found, session, service)
        _webhooks(found, session, service, [job.id for job in rows])
        for message in session.scalars(select(OutboxMessage).where(OutboxMessage.published_at.is_(None))):
            found.breach("unsettled", f"outbox message {message.id} of {message.job_id} still waits")
    return found


def _order(found: Verdict, order: Order, jobs: list[Job]) -> None:
    """One order: one job, or one and its retries, in the state it must have."""
    firsts = [job for job in jobs if job.retry_of is None]
    if not firsts:
        found.breach("lost", f"order {order.number} has no job")
    if len(firsts) > 1:
        found.breach("doubled", f"order {order.number} has the jobs {[job.id for job in firsts]}")
    retried = {job.retry_of for job in jobs}
    for job in jobs:
        if job.status not in FINAL:
            found.breach("lost", f"{job.id} is still {job.status}")
            continue
        found.ended[job.status] = found.ended.get(job.status, 0) + 1
        found.attempts.append(job.attempts)
        right = {Status.SUCCEEDED} | ({Status.CANCELLED} if order.cancelled_in else set())
        went_on = job.id in retried and job.error_code in DISK_FULL
        if job.status not in right and not went_on:
            found.breach("wrong_state", f"{job.id} {job.status} {job.error_code}: {job.error_message}")


def _events(found: Verdict, session: Session, job: Job) -> None:
    events = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.seq)).all()
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        found.breach("doubled", f"{job.id}: its events have gaps")
    statuses = [Status(event.data["status"]) for event in events if event.type == "status"]
    for before, after in pairwise(statuses):
        if after not in TRANSITIONS[before]:
            found.breach("wrong_state", f"{job.id}: {before} was followed by {after}")
    if sum(status in FINAL for status in statuses) > 1:
        found.breach("doubled", f"{job.id} ended more than once: {statuses}")
    if not statuses or statuses[-1] != job.status:
        found.breach("wrong_state", f"{job.id} is {job.status}, and its last event says {statuses[-1:]}")


def _row(found: Verdict, job: Job) -> None:
    if job.status in FINAL and (job.lease_worker is not None or job.lease_expires_at is not None):
        found.breach("unsettled", f"{job.id} has ended and {job.lease_worker} still holds it")
    if not job.attempts <= MAX_ATTEMPTS or job.lease_token < job.attempts:
        found.breach("wrong_state", f"{job.id}: {job.attempts} attempts, token {job.lease_token}")


def _weights(
    found: Verdict,
    session: Session,
    service: Service,
    jobs: Sequence[Job],
    orders: Sequence[Order],
    undisturbed: Mapping[str, str],
) -> None:
    specs = {str(order.number): order.spec for order in orders}
    checkpoints = defaultdict(list)
    for row in session.scalars(select(Checkpoint)):
        checkpoints[row.job_id].append(row.id)
    for job in jobs:
        ids = checkpoints[job.id]
        if len(ids) > 1:
            found.breach("doubled", f"{job.id} has the checkpoints {ids}")
        if (job.status is Status.SUCCEEDED) != (ids == [job.checkpoint_id]):
            found.breach("wrong_state", f"{job.id} is {job.status}, its checkpoints are {ids}")
        for id_ in ids:
            found.compared += 1
            folder = checkpoint_folder(service, id_)
            if not folder.is_dir():
                found.breach("lost", f"{id_} of {job.id} has a row and no bytes")
            elif weights.digest(folder) != undisturbed[specs[job.meta["order"]]]:
                found.breach("other_weights", f"{id_} of {job.id} ({specs[job.meta['order']]})")


def _webhooks(found: Verdict, session: Session, service: Service, jobs: Sequence[str]) -> None:
    """Every change of state was told at least once, each time it was told under one id."""
    told = defaultdict(set)
    for message in received(service.inbox):
        data = message["data"]
        told[data["job"], data["seq"], data["status"]].add(message["webhook-id"])
    for event in session.scalars(select(Event).where(Event.job_id.in_(jobs), Event.type == "status")):
        ids = told[event.job_id, event.seq, event.data["status"]]
        if not ids:
            found.breach("untold", f"{event.job_id}: {event.data['status']} (event {event.seq}) was not told")
        if len(ids) > 1:
            found.breach("doubled", f"{event.job_id}: event {event.seq} was told as {sorted(ids)}")


def checkpoint_folder(service: Service, checkpoint_id: str) -> Path:
    """Where the files of a checkpoint lie."""
    return service.disk / "artefacts" / "checkpoints" / checkpoint_id


def _storage(found: Verdict, session: Session, service: Service) -> None:
    """Bytes and rows name each other, and the bytes are those that were written."""
    artefacts = service.disk / "artefacts"
    rows = {row.id: row for row in session.scalars(select(Checkpoint))}
    for name in names(artefacts / "checkpoints") - rows.keys():
        found.breach("orphans", f"checkpoints/{name} has no row")
    for id_, row in rows.items():
        for entry in row.manifest["files"]:
            path = artefacts / "checkpoints" / id_ / entry["name"]
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                found.breach("lost", f"checkpoints/{id_}/{entry['name']} is not what its manifest says")
    files = {row.id for row in session.scalars(select(File).where(File.deleted_at.is_(None)))}
    stored = {name.split(".")[0] for name in names(artefacts / "files")}
    for name in stored ^ files:
        found.breach("orphans" if name in stored else "lost", f"files/{name} is only one of row and bytes")
    for name in names(artefacts / ".drafts"):
        found.breach("orphans", f".drafts/{name} is left over")
    ended = {job.id for job in session.scalars(select(Job).where(Job.status == Status.SUCCEEDED))}
    for name in names(service.disk / "work") & ended:
        found.breach("orphans", f"work/{name} is left of a job that succeeded")


def names(folder: Path) -> set[str]:
    """What lies in a folder, if it is there."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def at_rest(service: Service, orders: Sequence[Order], run: str, undisturbed: Mapping[str, str]) -> bool:
    """Has everything settled, so that a verdict can be given? (Orphans are swept some time after.)"""
    found = judge(service, orders, run, undisturbed)
    return not any(rule in ("orphans", "untold", "unsettled", "lost") for rule, _ in found.breaches)
