"""Tenants, their limits, and quotas that two requests at once cannot pass together."""

from __future__ import annotations

import threading

import pytest

from store.database import Database
from store.errors import InvalidNameError, NameTakenError, NotFoundError, QuotaExceededError
from store.files import Files
from store.jobs import Jobs, JobSpec, SetRef
from store.limits import Limits
from store.tables import File
from store.tenants import Quota, Tenants, limits_of
from tests.seeds import add_file, add_job, add_model

FREE = Limits(0, 0, 0)


def test_a_tenant_has_the_limits_of_the_settings_and_its_own(database: Database) -> None:
    settings = Limits(10, 1000, 60)
    with database.write() as session:
        assert limits_of(session, "acme", settings) == settings
        row = Tenants(session).create("acme")
        assert limits_of(session, "acme", settings) == settings
        row.max_active_jobs, row.requests_per_minute = 2, 0
        assert limits_of(session, "acme", settings) == Limits(2, 1000, 0)
        assert limits_of(session, "other", settings) == settings


def test_names_of_tenants(database: Database) -> None:
    with database.write() as session:
        tenants = Tenants(session)
        tenants.create("acme-2")
        with pytest.raises(NameTakenError):
            tenants.create("acme-2")
        for wrong in ("", "Acme", "-a", "a b", "a" * 64, "a/b"):
            with pytest.raises(InvalidNameError):
                tenants.create(wrong)
        with pytest.raises(NotFoundError):
            tenants.get("nobody")
        assert tenants.get("default").id == "default"
        assert [row.id for row in tenants.list()] == ["acme-2", "default"]


def test_quotas_say_what_is_used_allowed_and_to_be_done(database: Database) -> None:
    add_job(database, tenant="acme")
    with database.write() as session:
        used = Quota(session, "acme").used()
        assert used.active_jobs == 1
        assert used.stored_bytes == session.get_one(File, Files(session, "acme").list().data[0].id).bytes > 0
        Quota(session, "acme").check(FREE, jobs=1000, stored_bytes=1 << 60)
        Quota(session, "acme").check(Limits(2, used.stored_bytes + 5, 0), jobs=1, stored_bytes=5)
        Quota(session, "theirs").check(Limits(1, 5, 0), jobs=1, stored_bytes=5)
        with pytest.raises(QuotaExceededError, match=r"1 jobs are queued or running; 1 are allowed.*cancel"):
            Quota(session, "acme").check(Limits(1, 0, 0), jobs=1)
        with pytest.raises(
            QuotaExceededError, match=rf"{used.stored_bytes} bytes are stored and this needs 6 .*Delete"
        ):
            Quota(session, "acme").check(Limits(0, used.stored_bytes + 5, 0), stored_bytes=6)


def test_the_last_place_is_given_once(database: Database) -> None:
    """Twelve requests at once, three places: three jobs, on either database."""
    model, file = add_model(database, tenant="acme"), add_file(database, tenant="acme")
    together, refused = threading.Barrier(12), list[QuotaExceededError]()

    def submit() -> None:
        together.wait()
        try:
            with database.write() as session:
                Quota(session, "acme").check(Limits(3, 0, 0), jobs=1)
                Jobs(session, "acme").create(JobSpec(model, SetRef(file, "0" * 64), {}, 0))
        except QuotaExceededError as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert Quota(session, "acme").used().active_jobs == 3
    assert len(refused) == 9
