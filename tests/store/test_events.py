"""Events: numbered without gaps, whoever writes them and however many at once."""

from __future__ import annotations

import threading

import pytest

from store import events
from store.database import Database
from store.events import Events
from tests.seeds import add_job, add_running


def numbers(database: Database, job_id: str, after: int = 0, limit: int = 1000) -> list[int]:
    with database.read() as session:
        return [event.seq for event in Events(session).list(job_id, after, limit)]


def test_gap_free_under_concurrent_writers_and_rollbacks(database: Database) -> None:
    held = add_running(database)
    barrier = threading.Barrier(5)
    seen: list[list[int]] = []

    def write(own: int) -> None:
        barrier.wait()
        for number in range(20):
            try:
                with database.write() as session:
                    events.append(session, held.job_id, "rung", {"writer": own, "number": number})
                    if number % 5 == 4:
                        raise RuntimeError
            except RuntimeError:
                continue

    def read() -> None:
        barrier.wait()
        for _ in range(30):
            seen.append(numbers(database, held.job_id))  # noqa: PERF401

    threads = [threading.Thread(target=write, args=(own,)) for own in range(4)]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = 2 + 4 * 16  # queued and running before
    assert numbers(database, held.job_id) == list(range(1, written + 1))
    # A reader never sees number n + 1 without number n: what it has read so far is all there is up to there.
    assert all(one == list(range(1, len(one) + 1)) for one in seen)


def test_jobs_are_numbered_apart(database: Database) -> None:
    one, two = add_job(database), add_job(database)
    with database.write() as session:
        assert events.append(session, one, "rung", {}) == 2
        assert events.append(session, two, "rung", {}) == 2
        assert events.append(session, two, "rung", {}) == 3


def test_list_after_and_limit(database: Database) -> None:
    job_id = add_job(database)
    with database.write() as session:
        for _ in range(9):
            events.append(session, job_id, "rung", {})
    assert numbers(database, job_id, after=4, limit=3) == [5, 6, 7]
    assert numbers(database, job_id, after=10) == []


def test_an_unknown_job_has_no_events_and_takes_none(database: Database) -> None:
    assert numbers(database, "job_nobody") == []
    with pytest.raises(Exception, match="No row"), database.write() as session:
        events.append(session, "job_nobody", "rung", {})
