"""The small repositories: files, models, outbox, audit."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import update

from store.audit import Audit
from store.database import Database
from store.errors import FileDeletedError, FileInUseError, NameTakenError, NotFoundError
from store.files import Files, artefact_key
from store.models import Models
from store.outbox import Outbox
from store.tables import File, OutboxMessage, now
from tests.seeds import add_file, add_job, add_model, add_running, get_job


def test_files_are_listed_by_purpose(database: Database) -> None:
    forget, retain = add_file(database, "forget"), add_file(database, "retain")
    with database.read() as session:
        files = Files(session)
        assert [file.id for file in files.list().data] == [retain, forget]
        assert [file.id for file in files.list(purpose="forget").data] == [forget]
        file = files.get(forget)
        assert (file.bytes, file.examples, file.tokens_estimate) == (10, 2, 3)
    assert artefact_key(forget) == f"files/{forget}.jsonl"


def test_a_file_in_use_stays_and_a_used_one_goes(database: Database) -> None:
    held = add_running(database)
    file_id = get_job(database, held.job_id).forget_file
    with database.write() as session, pytest.raises(FileInUseError, match=held.job_id):
        Files(session).delete(file_id)
    held.succeed()
    with database.write() as session:
        Files(session).delete(file_id)
    with database.write() as session, pytest.raises(FileDeletedError, match=file_id):
        Files(session).delete(file_id)
    job = get_job(database, held.job_id)
    assert (job.forget_file, job.forget_sha256) == (file_id, "0" * 64)


def test_a_deleted_file_is_a_tombstone(database: Database) -> None:
    file_id, other = add_file(database), add_file(database)
    with database.write() as session:
        Files(session).delete(file_id)
    with database.read() as session:
        assert [file.id for file in Files(session).list().data] == [other]
        row = session.get(File, file_id)
        assert row is not None
        assert (row.name, row.sha256, row.examples) == ("", "0" * 64, 2)
        assert row.deleted_at is not None
    with database.write() as session:
        for look in (Files(session).get, Files(session).held, Files(session).delete):
            with pytest.raises(FileDeletedError, match="was deleted at 20"):
                look(file_id)
    with database.read() as session, pytest.raises(NotFoundError):
        Files(session, "another").get(file_id)


def test_a_file_that_a_job_is_about_to_name_cannot_be_deleted_meanwhile(postgres_url: str) -> None:
    database = Database(postgres_url)
    file_id, done = add_file(database), threading.Event()

    def delete() -> None:
        with database.write() as session:
            Files(session).delete(file_id)
        done.set()

    with database.write() as session:
        Files(session).held(file_id)
        thread = threading.Thread(target=delete)
        thread.start()
        assert not done.wait(0.3)
    thread.join(10)
    assert done.is_set()
    database.dispose()


def test_models_by_id_and_by_name(database: Database) -> None:
    with database.write() as session:
        models = Models(session)
        model = models.create("olmoe", "/models/olmoe", "sha256:1", {"moe_layers": [0, 1]})
        assert models.get("olmoe").id == models.get(model.id).id == model.id
        with pytest.raises(NameTakenError, match="olmoe"):
            models.create("olmoe", "/elsewhere", "sha256:2", {})
    other = add_model(database)
    with database.read() as session:
        assert Models(session).get("olmoe").facts == {"moe_layers": [0, 1]}
        assert [one.id for one in Models(session).list().data] == [other, model.id]


def test_a_name_that_looks_like_another_models_id_does_not_hide_it(database: Database) -> None:
    with database.write() as session:
        models = Models(session)
        first = models.create("first", "/p", "d", {})
        second = models.create(first.id, "/p", "d", {})
        assert models.get(first.id).id == first.id
        assert models.get(second.id).id == second.id


def test_of_many_registrations_under_one_name_one_wins(database: Database) -> None:
    barrier, answers = threading.Barrier(6), []

    def register() -> None:
        barrier.wait()
        try:
            with database.write() as session:
                answers.append(Models(session).create("olmoe", "/p", "d", {}).id)
        except NameTakenError:
            answers.append(None)

    threads = [threading.Thread(target=register) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert sum(answer is not None for answer in answers) == 1


def test_outbox_keeps_what_nobody_took(database: Database) -> None:
    ids = [add_job(database) for _ in range(3)]
    with database.write() as session:
        outbox = Outbox(session)
        pending = outbox.pending()
        assert [message.job_id for message in pending] == ids
        assert [message.job_id for message in outbox.pending(limit=2)] == ids[:2]
        outbox.mark_published([pending[0].id])
        outbox.settle(ids[1])
    with database.read() as session:
        assert [message.job_id for message in Outbox(session).pending()] == ids[2:]


def test_outbox_reopens_what_a_broker_lost(database: Database) -> None:
    taken, waiting, fresh, pending = add_running(database).job_id, *(add_job(database) for _ in range(3))
    with database.write() as session:
        outbox = Outbox(session)
        ids = {message.job_id: message.id for message in outbox.pending()}
        outbox.mark_published([ids[waiting], ids[fresh]])
        old = now() - timedelta(seconds=60)
        # The taken job's message was settled by its claim, as long ago.
        aged = OutboxMessage.job_id.in_([taken, waiting])
        session.execute(update(OutboxMessage).where(aged).values(published_at=old))
    with database.write() as session:
        assert Outbox(session).reopen_lost(30) == 1
        assert {message.job_id for message in Outbox(session).pending()} == {waiting, pending}
    with database.write() as session:
        assert Outbox(session).reopen_lost(30) == 0


def test_outbox_reopens_one_message_of_a_job_that_was_requeued(database: Database) -> None:
    held = add_running(database)
    held.hand_back()
    with database.write() as session:
        outbox = Outbox(session)
        (again,) = outbox.pending()
        outbox.mark_published([again.id])
        session.execute(update(OutboxMessage).values(published_at=now() - timedelta(seconds=60)))
        assert outbox.reopen_lost(30) == 1
        assert [message.id for message in outbox.pending()] == [again.id]


def test_audit_is_read_in_order(database: Database) -> None:
    with database.write() as session:
        audit = Audit(session)
        for number in range(3):
            audit.record("key_1", "file.delete", f"file_{number}")
    with database.read() as session:
        rows = Audit(session).list()
        assert [(row.who, row.what, row.object) for row in rows] == [
            ("key_1", "file.delete", f"file_{number}") for number in range(3)
        ]
        assert [row.object for row in Audit(session).list(after=rows[0].id, limit=1)] == ["file_1"]
