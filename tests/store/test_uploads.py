"""Uploads in parts: which parts count, who wins a race, and that what has expired is gone."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from store.database import Database
from store.errors import (
    NotFoundError,
    TooManyUploadsError,
    UploadChangedError,
    UploadCompleteError,
    UploadIncompleteError,
    UploadTooLargeError,
)
from store.tables import Upload, UploadPart, now
from store.uploads import MAX_OPEN, NewUpload, Uploads, expired, folder_key, forget, part_key
from tests.seeds import add_file

GIB = 1 << 30


def begin(database: Database, size: int | None = None, seconds: float = 60, tenant: str = "default") -> str:
    with database.write() as session:
        announced = NewUpload("forget", "big.jsonl", "jsonl", size, None)
        return Uploads(session, tenant).create(announced, seconds).id


def put(
    database: Database, upload: str, number: int, name: str, size: int = 10, digest: str = "a"
) -> str | None:
    part = UploadPart(upload_id=upload, number=number, name=name, bytes=size, sha256=digest * 64)
    with database.write() as session:
        return Uploads(session).put(upload, part, 60, GIB)


def names(database: Database, upload: str) -> list[tuple[int, str]]:
    with database.read() as session:
        return [(part.number, part.name) for part in Uploads(session).parts(upload)]


def test_a_part_is_replaced_and_the_bytes_that_no_longer_count_are_named(database: Database) -> None:
    upload = begin(database)
    assert put(database, upload, 2, "x") is None
    assert put(database, upload, 1, "y") is None
    assert put(database, upload, 1, "again") == "again"  # the same bytes: what is there stays
    assert put(database, upload, 1, "other", digest="b") == "y"
    assert names(database, upload) == [(1, "other"), (2, "x")]
    assert part_key(upload, "x") == f"{folder_key(upload)}/x" == f"uploads/{upload}/x"


def test_what_is_announced_bounds_the_parts(database: Database) -> None:
    upload = begin(database, size=25)
    put(database, upload, 1, "a")
    put(database, upload, 2, "b")
    with pytest.raises(UploadTooLargeError, match="30 bytes, more than 25"):
        put(database, upload, 3, "c")
    with database.read() as session, pytest.raises(UploadIncompleteError, match="20 bytes together, but 25"):
        Uploads(session).whole(upload)
    assert put(database, upload, 3, "c", size=5) is None
    with database.read() as session:
        assert [part.number for part in Uploads(session).whole(upload)[1]] == [1, 2, 3]
    part = UploadPart(upload_id=upload, number=1, name="d", bytes=11, sha256="d" * 64)
    with database.write() as session, pytest.raises(UploadTooLargeError):
        Uploads(session).put(upload, part, 60, 20)


@pytest.mark.parametrize(("there", "missing"), [((), 1), ((2,), 1), ((1, 3), 2)])
def test_a_gap_is_named(database: Database, there: tuple[int, ...], missing: int) -> None:
    upload = begin(database)
    for number in there:
        put(database, upload, number, f"n{number}")
    with database.read() as session, pytest.raises(UploadIncompleteError, match=f"Part {missing} is missing"):
        Uploads(session).whole(upload)


def test_who_completes_first_wins_and_both_get_the_same_file(database: Database) -> None:
    upload = begin(database)
    put(database, upload, 1, "a")
    files = [add_file(database), add_file(database)]
    with database.read() as session:
        _, parts = Uploads(session).whole(upload)
    barrier, answers = threading.Barrier(2), []

    def complete(file_id: str) -> None:
        barrier.wait()
        with database.write() as session:
            answers.append(Uploads(session).finish(upload, parts, file_id))

    threads = [threading.Thread(target=complete, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert answers[0] in files
    assert names(database, upload) == []
    with database.read() as session:
        row, parts = Uploads(session).whole(upload)
        assert (row.file_id, parts) == (answers[0], [])
        assert Uploads(session).list().data == []
    with pytest.raises(UploadCompleteError, match=answers[0]):
        put(database, upload, 1, "b")


def test_a_part_replaced_meanwhile_stops_the_completion(database: Database) -> None:
    upload = begin(database)
    put(database, upload, 1, "a")
    with database.read() as session:
        _, parts = Uploads(session).whole(upload)
    put(database, upload, 1, "b", digest="b")
    with database.write() as session, pytest.raises(UploadChangedError):
        Uploads(session).finish(upload, parts, add_file(database) if not database.is_sqlite else "file_x")


def test_what_has_expired_is_not_found_and_can_be_forgotten(database: Database) -> None:
    gone, stays = begin(database, tenant="one"), begin(database)
    part = UploadPart(upload_id=gone, number=1, name="a", bytes=1, sha256="a" * 64)
    with database.write() as session:
        Uploads(session, "one").put(gone, part, 60, GIB)
        assert list(expired(session)) == []
        Uploads(session, "one").expire(gone)
    with database.write() as session:
        uploads = Uploads(session, "one")
        again = UploadPart(upload_id=gone, number=1, name="b", bytes=1, sha256="b" * 64)
        acts = [
            lambda: uploads.get(gone),
            lambda: uploads.whole(gone),
            lambda: uploads.put(gone, again, 60, GIB),
            lambda: uploads.finish(gone, [], "file_x"),
            lambda: uploads.expire(gone),
        ]
        for act in acts:
            with pytest.raises(NotFoundError):
                act()
        assert list(expired(session)) == [gone]
        forget(session, gone)
        forget(session, stays)  # it is open: nothing happens
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(UploadPart)) == 0
        assert [row.id for row in Uploads(session).list().data] == [stays]


def test_a_part_keeps_the_upload_open(database: Database) -> None:
    upload = begin(database)
    with database.write() as session:
        session.execute(update(Upload).values(expires_at=now() + timedelta(seconds=1)))
    put(database, upload, 1, "a")
    with database.read() as session:
        assert Uploads(session).get(upload).expires_at > now() + timedelta(seconds=30)


def test_open_uploads_are_bounded_for_each_tenant(database: Database) -> None:
    announced = NewUpload("forget", "a", "jsonl", None, None)
    with database.write() as session:
        uploads = Uploads(session)
        ids = [uploads.create(announced, 60).id for _ in range(MAX_OPEN)]
        with pytest.raises(TooManyUploadsError):
            uploads.create(announced, 60)
        Uploads(session, "another").create(announced, 60)
        uploads.expire(ids[0])
        uploads.create(announced, 60)


def test_another_tenants_upload_is_not_found(database: Database) -> None:
    upload = begin(database, tenant="one")
    with database.write() as session:
        for act in (Uploads(session).get, Uploads(session).expire, Uploads(session).whole):
            with pytest.raises(NotFoundError):
                act(upload)
