"""Idempotency keys: one answer for each, whatever happens in between."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from store.database import Database
from store.errors import IdempotencyKeyReusedError, InFlightError
from store.idempotency import Answered, Asked, Idempotency, expire
from store.tables import IdempotentRequest
from tests.seeds import everything

ASKED = Asked("k1", "POST /jobs", "0" * 64)
ANSWER = Answered(202, {"Location": "/jobs/job_1"}, '{"id": "job_1"}')
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


def reserve(database: Database, asked: Asked = ASKED, tenant: str = "ours") -> datetime | Answered:
    with database.write() as session:
        return Idempotency(session, tenant).reserve(asked, MINUTE, DAY)


def answer(database: Database, reserved_at: datetime | Answered, given: Answered = ANSWER) -> None:
    assert isinstance(reserved_at, datetime)
    with database.write() as session:
        Idempotency(session, "ours").answer(ASKED.key, reserved_at, given)


def age(database: Database, by: timedelta) -> None:
    with database.write() as session:
        row = session.get_one(IdempotentRequest, ("ours", ASKED.key))
        row.created_at -= by


def test_the_first_answer_is_everybodys(database: Database) -> None:
    answer(database, reserve(database))
    assert reserve(database) == reserve(database) == ANSWER


def test_a_key_is_one_request(database: Database) -> None:
    reserved = reserve(database)
    for other in (replace(ASKED, fingerprint="1" * 64), replace(ASKED, route="POST /files")):
        with pytest.raises(IdempotencyKeyReusedError):
            reserve(database, other)
    answer(database, reserved)
    with pytest.raises(IdempotencyKeyReusedError):
        reserve(database, replace(ASKED, fingerprint="1" * 64))
    assert isinstance(reserve(database, tenant="theirs"), datetime)  # a key belongs to its tenant


def test_who_is_at_work_is_not_disturbed(database: Database) -> None:
    reserved = reserve(database)
    with pytest.raises(InFlightError):
        reserve(database)
    with database.write() as session:
        assert isinstance(reserved, datetime)
        Idempotency(session, "ours").release(ASKED.key, reserved)
    assert isinstance(reserve(database), datetime)


def test_who_was_taken_over_can_write_nothing(database: Database) -> None:
    first = reserve(database)
    age(database, timedelta(minutes=2))
    assert isinstance(first, datetime)
    second = reserve(database)
    assert isinstance(second, datetime)
    before = everything(database)
    with pytest.raises(InFlightError):
        answer(database, first - timedelta(minutes=2))
    with database.write() as session:
        Idempotency(session, "ours").release(ASKED.key, first - timedelta(minutes=2))
    assert everything(database) == before
    answer(database, second)
    with pytest.raises(InFlightError):  # nor can anybody answer twice
        answer(database, second, replace(ANSWER, status=500))
    assert reserve(database) == ANSWER


def test_many_at_once_are_one_at_work(database: Database) -> None:
    together, got = threading.Barrier(8), list[object]()

    def ask() -> None:
        together.wait()
        try:
            got.append(reserve(database))
        except InFlightError as error:
            got.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, datetime) for one in got) == 1
    assert sum(isinstance(one, InFlightError) for one in got) == 7


def test_answers_are_forgotten_in_time(database: Database) -> None:
    answer(database, reserve(database))
    age(database, timedelta(hours=25))
    # Also before the duty comes by: then another request may use the key.
    fresh = reserve(database, replace(ASKED, fingerprint="1" * 64))
    answer(database, fresh)
    with database.write() as session:
        assert expire(session, DAY) == 0
    age(database, timedelta(hours=25))
    with database.write() as session:
        assert expire(session, DAY) == 1
        assert session.get(IdempotentRequest, ("ours", ASKED.key)) is None
