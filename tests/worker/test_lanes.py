"""The two lanes as real processes: the database lane on both databases, the Celery lane on a real Redis."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from store.database import Database
from store.jobs import Jobs
from store.outbox import Outbox
from tests.services import free_port, redis_on, wait_until
from tests.worker.conftest import House, children_of, is_alive

Make = Callable[..., House]
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


def test_database_lane_runs_what_is_queued_and_what_comes(make_house: Make) -> None:
    house = make_house("works")
    first = house.submit()
    worker = house.start("worker", "--lane", "database")
    house.wait_for(first, "succeeded")
    second = house.submit()
    house.wait_for(second, "succeeded")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0


def test_database_lane_hands_its_job_back_when_stopped(make_house: Make) -> None:
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    worker = house.start("worker", "--lane", "database")
    pid = house.wait_for_pid(job_id)["pid"]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert house.job(job_id).status == "queued"
    assert not is_alive(pid)


def test_when_the_worker_is_killed_its_engine_dies_and_its_job_is_run_again(make_house: Make) -> None:
    house = make_house("ignores_stop", lease_seconds=1)
    job_id = house.submit()
    worker = house.start("worker", "--lane", "database")
    pid = house.wait_for_pid(job_id)["pid"]
    worker.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), 5, "the engine to follow its supervisor")
    again = house.with_settings(engine_entry="tests.worker.entries:works")
    again.start("worker", "--lane", "database")
    job = house.wait_for(job_id, "succeeded")
    assert job.attempts == 2
    assert [data["status"] for data in house.events(job_id, "status")] == [
        "queued",
        "running",
        "queued",
        "running",
        "succeeded",
    ]


def test_a_worker_that_dies_while_it_cancels_leaves_a_cancelled_job(make_house: Make) -> None:
    """Its engine ignores the stop, and nobody is left to kill it but the kernel; the lease ends the job."""
    house = make_house("ignores_stop", lease_seconds=1.5)
    job_id = house.submit()
    worker = house.start("worker", "--lane", "database")
    pids = house.wait_for_pid(job_id)
    house.cancel(job_id)
    worker.send_signal(signal.SIGKILL)
    assert house.job(job_id).status == "cancelling"
    house.start("worker", "--lane", "database")
    job = house.wait_for(job_id, "cancelled")
    assert (job.attempts, job.lost_leases, job.error_code) == (1, 1, None)
    wait_until(lambda: not is_alive(pids["pid"]), 5, "the engine to follow its supervisor")


@POSTGRES
def test_a_cancel_needs_no_broker(make_house: Make) -> None:
    """Redis goes away for good while one job runs and another waits: both are cancelled."""
    with redis_on(free_port()) as url:
        house = make_house("runs_until_stopped", broker_url=url)
        running = house.submit()
        start_celery(house)
        house.wait_for_pid(running)
        waiting = house.submit()
    for job_id in (running, waiting):
        house.cancel(job_id)
    for job_id in (running, waiting):
        house.wait_for(job_id, "cancelled")


def ready_engine(worker: subprocess.Popen[bytes], but: int | None = None) -> int:
    """The one process that the worker has started (another one than `but`)."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in children_of(worker.pid) if pid != but and is_alive(pid)]
        return len(found) == 1

    wait_until(look, 30, "an engine to be ready")
    return found[0]


@SQLITE
def test_an_engine_is_ready_before_its_job(make_house: Make) -> None:
    house = make_house("runs_until_stopped", warm_engine=True)
    worker = house.start("worker", "--lane", "database")
    first = ready_engine(worker)
    job_id = house.submit()
    assert house.wait_for_pid(job_id)["pid"] == first
    assert children_of(worker.pid) == [first]  # memory for one engine at a time
    house.cancel(job_id)
    house.wait_for(job_id, "cancelled")
    second = ready_engine(worker, but=first)
    os.kill(second, signal.SIGKILL)
    job_id = house.submit()
    assert house.wait_for_pid(job_id)["pid"] not in (first, second)
    house.cancel(job_id)
    house.wait_for(job_id, "cancelled")
    third = ready_engine(worker)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert not is_alive(third)


@POSTGRES
def test_a_celery_worker_has_an_engine_ready_and_takes_it_along(make_house: Make, redis_url: str) -> None:
    house = make_house("runs_until_stopped", broker_url=redis_url, warm_engine=True)
    start_celery(house)
    worker = house.processes[-1]
    child = ready_engine(worker)
    wait_until(lambda: len(children_of(child)) == 1, 30, "an engine to be ready")
    (ready,) = children_of(child)
    job_id = house.submit()
    assert house.wait_for_pid(job_id)["pid"] == ready
    house.cancel(job_id)
    house.wait_for(job_id, "cancelled")
    wait_until(lambda: children_of(child) not in ([], [ready]), 30, "the next engine")
    (following,) = children_of(child)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(40) == 0
    wait_until(lambda: not is_alive(following), 5, "the engine to follow its worker")


@POSTGRES
def test_a_database_that_drops_its_connections_loses_no_result(make_house: Make) -> None:
    """Every other session is ended five times a second: progress may be lost, the result may not."""
    house = make_house("works")
    job_id = house.submit(steps=200)
    house.start("worker", "--lane", "database")
    house.wait_for(job_id, "running")
    own = Database(house.settings.database_url)
    end_others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    status, dropped = "running", 0
    while status == "running":
        with own.write() as session:
            dropped += session.execute(text(f"{end_others} AND datname = current_database()")).scalar_one()
            status = Jobs(session).get(job_id).status
        time.sleep(0.2)
    own.dispose()
    assert dropped > 10
    job = house.job(job_id)
    assert (job.status, job.error_message) == ("succeeded", None)
    assert house.artefacts.exists(f"checkpoints/{job.checkpoint_id}/given.json")


@SQLITE
@pytest.mark.parametrize("command", [["worker", "--lane", "celery"], ["worker.dispatcher"]])
def test_without_a_broker_the_celery_lane_says_so(
    make_house: Make, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    process = make_house("works").start(*command)
    assert process.wait(30) == 1
    assert "SEUF_BROKER_URL" in capfd.readouterr().err


def start_celery(house: House, workers: int = 1) -> None:
    house.start("worker.dispatcher")
    for _ in range(workers):
        house.start("worker", "--lane", "celery")


@POSTGRES
def test_celery_lane(make_house: Make, redis_url: str) -> None:
    house = make_house("works", broker_url=redis_url)
    start_celery(house)
    ids = [house.submit() for _ in range(2)]
    for job_id in ids:
        job = house.wait_for(job_id, "succeeded", "failed", seconds=60)
        assert (job.status, job.attempts) == ("succeeded", 1)
    with house.database.read() as session:
        assert Outbox(session).pending() == []
    # Nothing stays with the broker: acknowledged early, and no result backend.
    broker = redis.Redis.from_url(redis_url)
    wait_until(lambda: broker.llen("seuf") == 0 and broker.hlen("unacked") == 0, 10, "an empty broker")
    assert [key for key in broker.keys() if b"celery-task-meta" in key] == []  # noqa: SIM118


@POSTGRES
def test_a_message_holds_a_job_id_and_nothing_else(make_house: Make, redis_url: str) -> None:
    house = make_house("works", broker_url=redis_url)
    job_id = house.submit()
    house.start("worker.dispatcher")
    broker = redis.Redis.from_url(redis_url)
    wait_until(lambda: broker.llen("seuf") == 1, 30, "the message")
    (message,) = (json.loads(one) for one in broker.lrange("seuf", 0, -1))
    assert message["content-type"] == "application/json"
    arguments, options, _ = json.loads(base64.b64decode(message["body"]))
    assert (arguments, options) == ([job_id], {})
    # The same message three times and one for nobody: one run.
    for extra in (job_id, job_id, "job_nobody"):
        body = json.dumps([[extra], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        copy = message | {"body": base64.b64encode(body.encode()).decode()}
        broker.lpush("seuf", json.dumps(copy))
    house.start("worker", "--lane", "celery")
    assert house.wait_for(job_id, "succeeded", seconds=60).attempts == 1
    wait_until(lambda: broker.llen("seuf") == 0, 20, "the other messages to be taken")
    assert house.job(job_id).attempts == 1


@POSTGRES
def test_a_job_does_not_wait_behind_a_busy_worker(make_house: Make, redis_url: str) -> None:
    """Prefetching would park the third job at one of the busy workers; and cancel reaches a job in this
    lane.
    """
    house = make_house("runs_until_stopped", broker_url=redis_url)
    start_celery(house, workers=2)
    first, second = house.submit(), house.submit()
    for job_id in (first, second):
        house.wait_for(job_id, "running", seconds=60)
    third = house.submit()
    broker = redis.Redis.from_url(redis_url)
    wait_until(lambda: broker.llen("seuf") == 1, 20, "the third message to wait at the broker")
    house.cancel(second)
    house.wait_for(second, "cancelled")
    house.wait_for(third, "running")
    for job_id in (first, third):
        house.cancel(job_id)
        house.wait_for(job_id, "cancelled")


@POSTGRES
def test_a_stopped_celery_worker_hands_its_job_back(make_house: Make, redis_url: str) -> None:
    house = make_house("runs_until_stopped", broker_url=redis_url)
    job_id = house.submit()
    start_celery(house)
    pid = house.wait_for_pid(job_id)["pid"]
    worker = house.processes[-1]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(40) == 0
    assert not is_alive(pid)
    assert house.job(job_id).status == "queued"
    house.start("worker", "--lane", "celery")
    resumed = house.wait_for_pid(job_id, count=2)["resumed_at"]
    assert resumed > 0


@POSTGRES
def test_when_a_celery_worker_is_killed_the_engine_dies_and_another_takes_the_job(
    make_house: Make, redis_url: str
) -> None:
    house = make_house("runs_until_stopped", broker_url=redis_url, lease_seconds=2)
    job_id = house.submit()
    start_celery(house)
    pid = house.wait_for_pid(job_id)["pid"]
    supervisor = parent_of(pid)
    house.processes[-1].send_signal(signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), 5, "the engine to follow its supervisor")
    house.start("worker", "--lane", "celery")
    house.wait_for_pid(job_id, count=2)
    assert house.job(job_id).attempts == 2


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
