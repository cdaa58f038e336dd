"""Another tenant's rows: not found, not listed, not changed.

Every public method of every repository is walked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.orm import Session

from store.audit import Audit
from store.checkpoints import Checkpoints
from store.database import Database
from store.errors import NotFoundError
from store.events import Events
from store.fenced import AttributionResult, FencedJob, Measurement, Selected
from store.files import Files
from store.idempotency import Idempotency
from store.jobs import Jobs, JobSpec, SetRef
from store.keys import Keys
from store.models import Models
from store.repository import Repository
from store.results import Results
from store.tables import UploadPart, WebhookAttempt, WebhookDelivery, now
from store.tenants import Quota
from store.uploads import NewUpload, Uploads
from store.webhooks import Webhooks
from tests.seeds import add_file, add_model, add_running, everything, get_job

Act = Callable[[Session, str, dict[str, str]], Any]


def _used(session: Session, tenant: str, ids: dict[str, str]) -> int:
    return Quota(session, tenant).used().stored_bytes


def part_of(ids: dict[str, str]) -> UploadPart:
    return UploadPart(upload_id=ids["upload"], number=1, name="part", bytes=1, sha256="0" * 64)


# What each method shows of another tenant's row: "missing" (NotFoundError) or "empty".
WALK: dict[tuple[type[Repository], str], tuple[str, Act]] = {
    (Jobs, "get"): ("missing", lambda s, t, ids: Jobs(s, t).get(ids["job"])),
    (Jobs, "list"): ("empty", lambda s, t, ids: Jobs(s, t).list().data),
    (Jobs, "request_cancel"): ("missing", lambda s, t, ids: Jobs(s, t).request_cancel(ids["job"])),
    (Files, "get"): ("missing", lambda s, t, ids: Files(s, t).get(ids["file"])),
    (Files, "list"): ("empty", lambda s, t, ids: Files(s, t).list().data),
    (Files, "delete"): ("missing", lambda s, t, ids: Files(s, t).delete(ids["file"])),
    (Models, "get"): ("missing", lambda s, t, ids: Models(s, t).get(ids["model"])),
    (Models, "list"): ("empty", lambda s, t, ids: Models(s, t).list().data),
    (Checkpoints, "get"): ("missing", lambda s, t, ids: Checkpoints(s, t).get(ids["checkpoint"])),
    (Checkpoints, "list"): ("empty", lambda s, t, ids: Checkpoints(s, t).list().data),
    (Events, "list"): ("empty", lambda s, t, ids: Events(s, t).list(ids["job"])),
    (Events, "newest_of_finished"): (
        "empty",
        lambda s, t, ids: Events(s, t).newest_of_finished("status", ids["model"]),
    ),
    (Results, "attribution"): ("empty", lambda s, t, ids: Results(s, t).attribution(ids["job"])),
    (Results, "selection"): ("empty", lambda s, t, ids: Results(s, t).selection(ids["job"])),
    (Results, "metrics"): ("empty", lambda s, t, ids: Results(s, t).metrics(ids["job"])),
    (Keys, "get"): ("missing", lambda s, t, ids: Keys(s, t).get(ids["key"])),
    (Keys, "rotate"): ("missing", lambda s, t, ids: Keys(s, t).rotate(ids["key"], b"s", timedelta(0))),
    (Quota, "used"): ("empty", _used),
    (Jobs, "moment"): ("missing", lambda s, t, ids: Jobs(s, t).moment(ids["job"])),
    (Jobs, "retry"): ("missing", lambda s, t, ids: Jobs(s, t).retry(ids["job"])),
    (Files, "held"): ("missing", lambda s, t, ids: Files(s, t).held(ids["file"])),
    (Events, "head"): ("missing", lambda s, t, ids: Events(s, t).head(ids["job"])),
    (Events, "heads"): ("empty", lambda s, t, ids: Events(s, t).heads([ids["job"]])),
    (Audit, "page"): ("empty", lambda s, t, ids: Audit(s, t).page(object_id=ids["job"]).data),
    (Audit, "heads"): ("empty", lambda s, t, ids: Audit(s, t).heads().data),
    (Audit, "end"): ("empty", lambda s, t, ids: Audit(s, t).end()[1]),
    (Uploads, "get"): ("missing", lambda s, t, ids: Uploads(s, t).get(ids["upload"])),
    (Uploads, "list"): ("empty", lambda s, t, ids: Uploads(s, t).list().data),
    (Uploads, "parts"): ("empty", lambda s, t, ids: Uploads(s, t).parts(ids["upload"])),
    (Uploads, "whole"): ("missing", lambda s, t, ids: Uploads(s, t).whole(ids["upload"])),
    (Uploads, "put"): ("missing", lambda s, t, ids: Uploads(s, t).put(ids["upload"], part_of(ids), 60, 99)),
    (Uploads, "finish"): ("missing", lambda s, t, ids: Uploads(s, t).finish(ids["upload"], [], ids["file"])),
    (Uploads, "expire"): ("missing", lambda s, t, ids: Uploads(s, t).expire(ids["upload"])),
    (Webhooks, "get"): ("missing", lambda s, t, ids: Webhooks(s, t).get(ids["webhook"])),
    (Webhooks, "held"): ("missing", lambda s, t, ids: Webhooks(s, t).held(ids["webhook"])),
    (Webhooks, "list"): ("empty", lambda s, t, ids: Webhooks(s, t).list().data),
    (Webhooks, "delete"): ("missing", lambda s, t, ids: Webhooks(s, t).delete(ids["webhook"])),
    (Webhooks, "rotate"): (
        "missing",
        lambda s, t, ids: Webhooks(s, t).rotate(ids["webhook"], "s", timedelta(0)),
    ),
    (Webhooks, "test"): ("missing", lambda s, t, ids: Webhooks(s, t).test(ids["webhook"])),
    (Webhooks, "deliveries"): ("missing", lambda s, t, ids: Webhooks(s, t).deliveries(ids["webhook"])),
    (Webhooks, "replay"): (
        "missing",
        lambda s, t, ids: Webhooks(s, t).replay(ids["webhook"], ids["delivery"]),
    ),
    (Webhooks, "attempts"): (
        "empty",
        lambda s, t, ids: Webhooks(s, t).attempts([ids["delivery"]])[ids["delivery"]],
    ),
    (Webhooks, "messages"): (
        "empty",
        lambda s, t, ids: Webhooks(s, t).messages([s.get_one(WebhookDelivery, ids["delivery"])]),
    ),
    (Keys, "list"): ("empty", lambda s, t, ids: Keys(s, t).list().data),
    (Keys, "revoke"): ("missing", lambda s, t, ids: Keys(s, t).revoke(ids["key"])),
    (Audit, "list"): ("empty", lambda s, t, ids: Audit(s, t).list()),
}
CREATORS = {
    *((repository, "create") for repository in (Jobs, Files, Models, Keys, Uploads, Webhooks)),
    (Audit, "record"),
    (Audit, "sign"),
    (Idempotency, "reserve"),
}
# Name no row but the tenant's own, or are given one that the repository found.
OWN = {
    (Quota, "check"),
    (Webhooks, "disable"),
    (Webhooks, "enable"),
    (Idempotency, "answer"),
    (Idempotency, "release"),
}


def fill(database: Database, tenant: str) -> dict[str, str]:
    """One row of everything for `tenant`."""
    held = add_running(database, tenant=tenant)
    held.attribution(AttributionResult("contrast", [[0.5]], [0], {"runs": 2}, 1.0))
    held.selection([Selected(0, 0, 0.5)])
    held.metrics([Measurement("before", "forget", "", "choice", 0.5, 10, 0.25)])
    with held.together():
        held.publish_checkpoint(f"ckpt_{tenant}", 1, {})
        held.succeed()
    job = get_job(database, held.job_id)
    with database.write() as session:
        key = Keys(session, tenant).create("a", b"secret").row
        Audit(session, tenant).record("system", "job.create", held.job_id)
        Audit(session, tenant).sign(Ed25519PrivateKey.generate())
        upload = Uploads(session, tenant).create(NewUpload("forget", "a", "jsonl", None, None), 60).id
        Uploads(session, tenant).put(upload, part_of({"upload": upload}), 60, 99)
        webhook = Webhooks(session, tenant).create("https://1.1.1.1/", "", [], "sealed").id
        delivery = Webhooks(session, tenant).test(webhook).id
        session.add(
            WebhookAttempt(
                tenant=tenant, delivery_id=delivery, number=1, at=now(), milliseconds=1, status_code=200
            )
        )
    return {
        "upload": upload,
        "webhook": webhook,
        "delivery": delivery,
        "job": job.id,
        "model": job.model_id,
        "file": job.forget_file,
        "key": key.id,
        "checkpoint": f"ckpt_{tenant}",
    }


def test_the_walk_is_complete() -> None:
    methods = {
        (repository, name)
        for repository in Repository.__subclasses__()
        for name, _ in inspect.getmembers(repository, inspect.isfunction)
        if not name.startswith("_")
    }
    assert methods == WALK.keys() | CREATORS | OWN


@pytest.fixture
def theirs(database: Database) -> dict[str, str]:
    return fill(database, "theirs")


@pytest.mark.parametrize("method", WALK, ids=lambda pair: f"{pair[0].__name__}.{pair[1]}")
def test_rows_of_another_tenant(
    database: Database, theirs: dict[str, str], method: tuple[type[Repository], str]
) -> None:
    shows, act = WALK[method]
    before = everything(database)
    with database.write() as session:
        if shows == "missing":
            with pytest.raises(NotFoundError):
                act(session, "ours", theirs)
        else:
            assert not act(session, "ours", theirs)
    assert everything(database) == before
    # And the owner does see it, so that an empty answer above means something.
    with database.read() as session:
        if shows == "empty":
            assert act(session, "theirs", theirs)
        elif method[1] == "get":
            assert act(session, "theirs", theirs).tenant == "theirs"


def test_creators_stamp_the_tenant(database: Database) -> None:
    model_id, file_id = add_model(database, tenant="ours"), add_file(database, tenant="ours")
    with database.write() as session:
        assert Models(session, "ours").get(model_id).tenant == "ours"
        assert Files(session, "ours").get(file_id).tenant == "ours"
        job = Jobs(session, "ours").create(JobSpec(model_id, SetRef(file_id, "0" * 64), {}, 0))
        assert [event.tenant for event in Events(session, "ours").list(job.id)] == ["ours"]
        assert Keys(session, "ours").create("a", b"s").row.tenant == "ours"
        Audit(session, "ours").record("system", "x", "y")
        assert [row.tenant for row in Audit(session, "ours").list()] == ["ours"]


def test_a_name_belongs_to_its_tenant(database: Database) -> None:
    with database.write() as session:
        ours = Models(session, "ours").create("olmoe", "/p", "d", {})
        theirs = Models(session, "theirs").create("olmoe", "/p", "d", {})
        assert Models(session, "ours").get("olmoe").id == ours.id != theirs.id


def test_a_worker_writes_for_the_jobs_tenant(database: Database) -> None:
    held = FencedJob(database, *_claim_of(database, "theirs"))
    held.event("selection", {"experts": 1})
    with database.read() as session:
        assert {event.tenant for event in Events(session, "theirs").list(held.job_id)} == {"theirs"}


def _claim_of(database: Database, tenant: str) -> tuple[str, int]:
    held = add_running(database, tenant=tenant)
    return held.job_id, held.token
