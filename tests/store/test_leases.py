"""Leases: one winner, a growing token, expiry."""

from __future__ import annotations

import multiprocessing
import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import update

from store import leases
from store.database import Database, utc_now
from store.errors import LeaseLost
from store.fenced import FencedJob
from store.jobs import Jobs
from store.leases import Claim
from store.outbox import Outbox
from store.tables import Job
from tests.seeds import add_job, add_model, add_running, everything, get_job


def claim(database: Database, job_id: str | None, seconds: float = 60) -> Claim | None:
    with database.write() as session:
        return leases.claim(session, job_id, "worker-1", seconds)


def release(database: Database, max_attempts: int = 3) -> list[Job]:
    with database.write() as session:
        return leases.release_expired(session, max_attempts)


def test_claim(database: Database) -> None:
    job_id = add_job(database)
    assert claim(database, job_id) == Claim(job_id, 1)
    job = get_job(database, job_id)
    assert (job.status, job.attempts, job.lease_worker, job.lease_token) == ("running", 1, "worker-1", 1)
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert job.lease_expires_at - job.started_at == timedelta(seconds=60)
    with database.read() as session:
        assert Outbox(session).pending() == []


def test_only_queued_jobs_can_be_claimed(database: Database) -> None:
    held = add_running(database)
    cancelled = add_job(database)
    with database.write() as session:
        Jobs(session).request_cancel(cancelled)
    before = everything(database)
    for job_id in (held.job_id, cancelled, "job_nobody", None):
        assert claim(database, job_id) is None
    assert everything(database) == before


def test_without_an_id_the_oldest_queued_job(database: Database) -> None:
    ids = [add_job(database) for _ in range(3)]
    found = [claim(database, None) for _ in range(4)]
    assert [one.job_id if one else None for one in found] == [*ids, None]


@pytest.mark.parametrize("by_id", [True, False])
def test_of_twenty_threads_one_wins(database: Database, by_id: bool) -> None:
    job_id = add_job(database)
    barrier, won = threading.Barrier(20), []

    def race() -> None:
        barrier.wait()
        if found := claim(database, job_id if by_id else None):
            won.append(found)

    run_threads(20, race)
    assert won == [Claim(job_id, 1)]
    assert get_job(database, job_id).attempts == 1


def test_threads_share_a_queue_without_overlap(database: Database) -> None:
    model_id = add_model(database)
    ids = {add_job(database, model_id=model_id) for _ in range(30)}
    taken: list[str] = []

    def drain() -> None:
        while found := claim(database, None):
            taken.append(found.job_id)

    run_threads(6, drain)
    # SKIP LOCKED may show a worker an empty queue while others hold the last rows; nothing may be taken
    # twice.
    drain()
    assert sorted(taken) == sorted(ids)


def race_in_process(url: str, job_id: str, barrier: object, wins: object) -> None:
    database = Database(url)
    with database.read() as session:
        utc_now(session)  # connected before the start
    barrier.wait()  # type: ignore[attr-defined]
    if found := claim(database, job_id):
        wins.put(found.token)  # type: ignore[attr-defined]


def test_of_six_processes_one_wins(database: Database, database_url: str) -> None:
    job_id = add_job(database)
    spawn = multiprocessing.get_context("fork")
    barrier, wins = spawn.Barrier(6), spawn.Queue()
    arguments = (database_url, job_id, barrier, wins)
    processes = [spawn.Process(target=race_in_process, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert wins.get(timeout=5) == 1
    assert wins.empty()
    assert get_job(database, job_id).attempts == 1


@pytest.mark.parametrize("repeat", range(5))
def test_claim_and_cancel_race_to_one_of_two_ends(database: Database, repeat: int) -> None:
    job_id = add_job(database)
    barrier = threading.Barrier(2)
    found: list[Claim | None] = []

    def take() -> None:
        barrier.wait()
        found.append(claim(database, job_id))

    def stop() -> None:
        barrier.wait()
        with database.write() as session:
            Jobs(session).request_cancel(job_id)

    threads = [threading.Thread(target=act) for act in (take, stop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_job(database, job_id).status == ("cancelled" if found == [None] else "cancelling")


def test_heartbeat_extends_and_tells_of_a_cancel(database: Database) -> None:
    held = add_running(database, lease_seconds=60)
    own = Claim(held.job_id, held.token)
    before = get_job(database, held.job_id).lease_expires_at
    with database.write() as session:
        assert leases.heartbeat(session, own, 600) == leases.Heartbeat(alive=True, cancel_requested=False)
    after = get_job(database, held.job_id).lease_expires_at
    assert before is not None
    assert after is not None
    assert timedelta(seconds=539) < after - before < timedelta(seconds=600)
    with database.write() as session:
        Jobs(session).request_cancel(held.job_id)
    with database.write() as session:
        assert leases.heartbeat(session, own, 600) == leases.Heartbeat(alive=True, cancel_requested=True)


def test_heartbeat_of_a_lost_or_ended_lease_changes_nothing(database: Database) -> None:
    held = add_running(database)
    ended = add_running(database)
    ended.succeed()
    before = everything(database)
    for claimed in (Claim(held.job_id, held.token - 1), Claim(ended.job_id, ended.token), Claim("job_x", 1)):
        own_end = claimed.job_id == ended.job_id
        with database.write() as session:
            assert leases.heartbeat(session, claimed, 600) == leases.Heartbeat(False, False, own_end)
    assert everything(database) == before


def test_a_live_lease_is_not_released(database: Database) -> None:
    add_running(database, lease_seconds=60)
    add_job(database)
    before = everything(database)
    assert release(database) == []
    assert everything(database) == before


def test_an_expired_lease_goes_back_to_the_queue_and_fences_its_worker(database: Database) -> None:
    held = add_running(database, lease_seconds=0.001)
    time.sleep(0.01)
    (job,) = release(database)
    assert (job.id, job.status, job.attempts, job.lease_worker) == (held.job_id, "queued", 1, None)
    assert (job.lease_expires_at, job.lost_leases) == (None, 1)
    with database.read() as session:
        assert [message.job_id for message in Outbox(session).pending()] == [held.job_id]
    with pytest.raises(LeaseLost):
        held.phase("unlearning", 1, 2)
    again = claim(database, held.job_id)
    assert again is not None
    assert again.token > held.token
    assert get_job(database, held.job_id).attempts == 2
    with pytest.raises(LeaseLost):
        held.succeed()
    FencedJob(database, again.job_id, again.token).succeed()


def test_no_attempt_left_fails_with_worker_lost(database: Database) -> None:
    held = add_running(database, lease_seconds=0.001)
    time.sleep(0.01)
    (job,) = release(database, max_attempts=1)
    assert (job.status, job.error_code) == ("failed", "WORKER_LOST")
    assert "worker-1" in (job.error_message or "")
    assert job.error_fix
    assert job.finished_at is not None
    assert claim(database, held.job_id) is None


def test_attempts_are_counted_to_the_end(database: Database) -> None:
    job_id = add_job(database)
    for attempt in (1, 2, 3):
        found = claim(database, job_id, 0.001)
        assert found is not None
        assert get_job(database, job_id).attempts == attempt
        time.sleep(0.01)
        (job,) = release(database)
        assert job.status == ("failed" if attempt == 3 else "queued")


def test_an_expired_cancel_is_carried_out(database: Database) -> None:
    held = add_running(database, lease_seconds=0.001)
    with database.write() as session:
        Jobs(session).request_cancel(held.job_id)
    time.sleep(0.01)
    (job,) = release(database)
    assert (job.status, job.error_code) == ("cancelled", None)


def test_limits_count_from_the_first_start(database: Database) -> None:
    held = add_running(database)
    own = Claim(held.job_id, held.token)
    with database.write() as session:
        assert leases.limits(session, own) == leases.Limits(None, None, None)
        started_at = utc_now(session) - timedelta(seconds=40)
        session.execute(
            update(Job).values(max_seconds=100.0, max_memory_bytes=1 << 40, started_at=started_at)
        )
    with database.read() as session:
        limits = leases.limits(session, own)
    assert (limits.max_seconds, limits.max_memory_bytes) == (100.0, 1 << 40)
    assert limits.seconds_left is not None
    assert 50 < limits.seconds_left <= 60


def test_reconcilers_release_a_lease_once(database: Database) -> None:
    for _ in range(4):
        add_running(database, lease_seconds=0.001)
    time.sleep(0.01)
    released: list[str] = []
    run_threads(5, lambda: released.extend(job.id for job in release(database)))
    assert len(released) == len(set(released)) == 4


def run_threads(number: int, act: object) -> None:
    threads = [threading.Thread(target=act) for _ in range(number)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
