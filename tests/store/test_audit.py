"""The audit log in both databases: one chain under writers at once, heads when they are due, acts of the service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import delete, update

from store import audit, chain, leases, signing, uploads
from store.audit import Audit, plain, plain_head
from store.database import Database
from store.settings import Settings
from store.tables import AuditChain, AuditHead, AuditRow, Job, Upload, now
from tests.seeds import add_job, add_running
from worker.audit import sign_heads

KEY = Ed25519PrivateKey.generate()
HOUR = timedelta(hours=1)


def export(database: Database, tenant: str = "default") -> Iterator[bytes]:
    with database.read() as session:
        rows, (_, newest) = Audit(session, tenant).list(limit=10_000), Audit(session, tenant).end()
    return chain.lines_of(map(plain, rows), plain_head(newest) if newest else None)


def record(database: Database, tenant: str = "default", number: int = 1) -> None:
    for _ in range(number):
        with database.write() as session:
            Audit(session, tenant).record("key_1", "file.delete", "file_1", "req_1")


def sign(database: Database, tenant: str = "default") -> None:
    with database.write() as session:
        Audit(session, tenant).sign(KEY)


def test_a_log_is_whole_as_it_comes_out_of_the_database(database: Database) -> None:
    record(database, number=3)
    sign(database)
    record(database)
    found = chain.verify(export(database), trusted={chain.key_id_of(KEY.public_key())})
    assert (found.tenant, found.rows, found.unsigned) == ("default", 5, 1)


def test_writers_at_once_make_one_chain(database: Database) -> None:
    """Two tenants, each with writers that take turns while one signs."""
    began = threading.Barrier(6)

    def write(tenant: str) -> None:
        began.wait()
        record(database, tenant, 15)

    def sign_too(tenant: str) -> None:
        began.wait()
        for _ in range(5):
            sign(database, tenant)

    threads = [
        threading.Thread(target=act, args=(tenant,))
        for tenant in ("one", "other")
        for act in (write, write, sign_too)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for tenant in ("one", "other"):
        sign(database, tenant)
        assert chain.verify(export(database, tenant)).rows == 36


def test_a_row_is_taken_back_with_its_transaction(database: Database) -> None:
    record(database)

    def fail() -> None:
        with database.write() as session:
            Audit(session).record("key_1", "job.create", "job_1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    sign(database)
    assert chain.verify(export(database)).rows == 2


@pytest.mark.parametrize(
    "name", ["who", "what", "object", "request_id", "at", "previous_hash", "hash", "seq", "tenant"]
)
def test_a_row_changed_in_the_database(database: Database, name: str) -> None:
    record(database, number=3)
    sign(database)
    other = {"at": now() - timedelta(days=1), "seq": 90, "previous_hash": "1" * 64, "hash": "1" * 64}.get(
        name, "x"
    )
    with database.write() as session:
        session.execute(update(AuditRow).where(AuditRow.seq == 2).values({name: other}))
    with pytest.raises(chain.BrokenError) as broken:
        chain.verify(export(database))
    assert broken.value.seq in (2, 3)


def test_rows_deleted_in_the_database(database: Database) -> None:
    """From the middle, or from the end together with where the chain stands."""
    record(database, number=3)
    sign(database)
    with database.write() as session:
        session.execute(delete(AuditRow).where(AuditRow.seq > 2))
        hash_ = session.scalar(
            AuditRow.__table__.select().with_only_columns(AuditRow.hash).where(AuditRow.seq == 2)
        )
        session.execute(update(AuditChain).values(seq=2, hash=hash_))
    with pytest.raises(chain.BrokenError) as broken:
        chain.verify(export(database))
    assert (broken.value.code, broken.value.seq) == ("cut_off", 2)


def test_a_log_is_due_when_it_has_new_rows_or_a_day_has_gone(database: Database) -> None:
    def due() -> list[str]:
        with database.read() as session:
            return audit.due(session, HOUR)

    def age(hours: float) -> None:
        with database.write() as session:
            session.execute(update(AuditHead).values(at=now() - timedelta(hours=hours)))

    assert due() == []
    record(database)
    assert due() == ["default"]
    sign(database)
    age(2)
    assert due() == []  # nothing new
    record(database)
    assert due() == ["default"]
    age(0.9)
    assert due() == []  # new, but signed within the hour
    sign(database)
    age(24.1)
    assert due() == ["default"]  # nothing new, but a day has gone


def test_the_duty_signs_every_tenant_with_the_key_of_the_service(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    record(database, "one")
    record(database, "other")
    sign_heads(database, settings)
    sign_heads(database, settings)  # nothing is due
    key = signing.public_key(settings)
    assert key is not None
    assert (tmp_path / "audit-key").stat().st_mode & 0o777 == 0o600
    for tenant in ("one", "other"):
        found = chain.verify(export(database, tenant), trusted={chain.key_id_of(key)})
        assert (found.rows, found.unsigned) == (2, 0)


def test_on_many_machines_the_key_is_given(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None is made; the public half is enough to show it, and signs nothing."""
    cluster = {
        "data_dir": tmp_path,
        "broker_url": "redis://127.0.0.1:1/0",
        "lane": "celery",
        "database_url": "sqlite://",
    }
    cluster["secret"] = "a secret that is long enough for any check of it"
    record(database)
    sign_heads(database, Settings(**cluster))
    assert "SEUF_AUDIT_KEY_FILE" in caplog.text
    assert not (tmp_path / "audit-key").exists()
    public, private = tmp_path / "public.pem", tmp_path / "private.pem"
    public.write_text(signing.as_pem(KEY.public_key()))
    private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert signing.private_key(Settings(**cluster, audit_key_file=str(public))) is None
    shown = signing.public_key(Settings(**cluster, audit_key_file=str(public)))
    assert shown is not None
    assert chain.key_id_of(shown) == chain.key_id_of(KEY.public_key())
    sign_heads(database, Settings(**cluster, audit_key_file=str(private)))
    assert chain.verify(export(database), trusted={chain.key_id_of(shown)}).rows == 2
    private.write_text("no key")
    with pytest.raises(signing.KeyFileError, match=r"private\.pem"):
        signing.private_key(Settings(**cluster, audit_key_file=str(private)))
    with pytest.raises(signing.KeyFileError, match="gone"):
        signing.private_key(Settings(**cluster, audit_key_file=str(tmp_path / "gone")))


def test_what_workers_do_is_done_by_the_system(database: Database) -> None:
    """Taken, lost, taken again and failed; a queued job that a caller asked for or cancelled is the caller's act."""
    job = add_running(database)
    with database.write() as session:
        session.execute(update(Job).values(lease_expires_at=datetime(2026, 1, 1, tzinfo=UTC)))
        leases.release_expired(session, 3)
    with database.write() as session:
        claim = leases.claim(session, job.job_id, "worker-2", 60)
    assert claim is not None
    job.token = claim.token
    job.fail("ENGINE_CRASHED", "", None)
    add_job(database)
    with database.read() as session:
        rows = [(row.who, row.what, row.object) for row in Audit(session).list()]
    assert rows == [
        ("system", what, job.job_id) for what in ("job.running", "job.lost", "job.running", "job.failed")
    ]


def test_what_a_sweep_deletes_is_told(database: Database) -> None:
    """Once, and only if it was there to be deleted."""
    with database.write() as session:
        session.add(
            Upload(
                id="upload_1",
                tenant="other",
                purpose="forget",
                name="forget.jsonl",
                format="jsonl",
                expires_at=now() - HOUR,
            )
        )
    for _ in range(2):
        with database.write() as session:
            uploads.forget(session, "upload_1")
    with database.read() as session:
        rows = [(row.who, row.what, row.object) for row in Audit(session, "other").list()]
    assert rows == [("system", "upload.expire", "upload_1")]


def test_pages_and_filters(database: Database) -> None:
    began = now()
    record(database, number=2)
    with database.write() as session:
        Audit(session).record("key_2", "job.create", "job_1")
    with database.read() as session:
        log = Audit(session)
        first = log.page(limit=2)
        assert [row.seq for row in first.data] == [3, 2]
        assert [row.seq for row in log.page(cursor=first.next).data] == [1]
        assert [row.seq for row in log.page(who="key_2").data] == [3]
        assert [row.seq for row in log.page(what="file.delete", object_id="file_1").data] == [2, 1]
        assert log.page(who="key_2", what="file.delete").data == []
        assert [row.seq for row in log.page(since=began).data] == [3, 2, 1]
        assert log.page(since=now() + HOUR).data == []
        assert Audit(session, "other").page().data == []
