"""The supervisor with real engine processes: every way in which an engine can end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from store import leases
from store.checkpoints import Checkpoints
from store.database import utc_now
from store.results import Results
from store.tables import Job
from tests.services import wait_until
from tests.worker.conftest import SECRET_TEXT, House, is_alive
from tests.worker.entries import STEP
from worker.folders import newest_training
from worker.supervisor import Supervisor

Make = Callable[..., House]
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what does not touch the database in a way of its own."""


def supervise(house: House, job_id: str | None = None, stop: Callable[[], bool] = lambda: False) -> bool:
    return Supervisor(house.database, house.settings, "worker-1").run(job_id, stop)


@contextmanager
def running(house: House, job_id: str, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """The supervisor at work beside the test; the block ends when it has ended."""
    thread = threading.Thread(target=supervise, args=(house, job_id, stop))
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def saved_step(house: House, job_id: str) -> int:
    """Where the newest training checkpoint of `runs_until_stopped` stands."""
    training = newest_training(house.settings.work_dir, job_id)
    assert training is not None
    return int((training / STEP).read_text())


@SQLITE
@pytest.mark.parametrize("variable", ["SEUF_SECRET", "SEUF_SECRET_FILE"])
def test_an_engine_is_told_no_secret_and_no_file_of_one(
    variable: str, make_house: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret, file = "w9Kx2PqLr7Tz4VbN8mYc3HsD6fGjA1eU", tmp_path / "secret-of-the-keys"
    file.write_text(secret)
    monkeypatch.setenv(variable, str(file) if variable.endswith("_FILE") else secret)
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    stop = threading.Event()
    with running(house, job_id, stop.is_set):
        pid = house.wait_for_pid(job_id)["pid"]
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        stop.set()
    names = {variable.partition("=")[0] for variable in environment}
    assert "SEUF_DATABASE_URL" in names
    assert variable not in names


@SQLITE
@pytest.mark.parametrize(("told", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_operator_says_otherwise(
    make_house: Make, monkeypatch: pytest.MonkeyPatch, told: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", told)
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    stop = threading.Event()
    with running(house, job_id, stop.is_set):
        pid = house.wait_for_pid(job_id)["pid"]
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        stop.set()
    assert f"OMP_WAIT_POLICY={expected}".encode() in environment


def test_a_job_from_claim_to_checkpoint(make_house: Make) -> None:
    house = make_house("works")
    job_id = house.submit(steps=5, seed=7)
    assert supervise(house, job_id) is True
    job = house.job(job_id)
    assert (job.status, job.error_code, job.attempts) == ("succeeded", None, 1)
    assert (job.phase, job.phase_done, job.phase_total) == ("evaluating", 2, 2)
    assert job.finished_at is not None
    with house.database.read() as session:
        checkpoint = Checkpoints(session).get(job.checkpoint_id or "")
        results = Results(session)
        attribution = results.attribution(job_id)
        selection = results.selection(job_id)
        metrics = results.metrics(job_id)
    folder = house.artefacts.path(f"checkpoints/{checkpoint.id}")
    given = json.loads((folder / "given.json").read_text())
    assert given == {"model": "/models/tiny", "forget": SECRET_TEXT, "steps": 5, "seed": 7}
    assert checkpoint.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert checkpoint.manifest["files"][0]["name"] == "given.json"
    assert attribution is not None
    assert attribution.matrix == [[0.1, 0.9], [0.5, None]]
    assert [(one.layer, one.expert) for one in selection] == [(1, 2)]
    assert [(one.stage, one.value) for one in metrics] == [("after", 0.25), ("before", 0.75)]
    assert not (house.settings.work_dir / job_id).exists()


@SQLITE
def test_events_tell_the_story_and_no_data(make_house: Make, capfd: pytest.CaptureFixture[str]) -> None:
    house = make_house("works")
    job_id = house.submit(steps=300)
    supervise(house, job_id)
    statuses = [data["status"] for data in house.events(job_id, "status")]
    assert statuses == ["queued", "running", "succeeded"]
    assert house.events(job_id, "selection")[0]["coverage"] == 0.8
    assert "matrix" not in house.events(job_id, "attribution")[0]
    # 300 steps of 5 ms and more: at most two rows a second of each kind, and the first and last of a phase.
    seconds = (house.job(job_id).finished_at - house.job(job_id).started_at).total_seconds()  # type: ignore[operator]
    steps, phases = house.events(job_id, "step"), house.events(job_id, "phase")
    assert 2 <= len(steps) <= 2 * seconds + 1
    assert len([one for one in phases if one["phase"] == "unlearning"]) <= 2 * seconds + 2
    assert phases[-2] == {"phase": "unlearning", "done": 300, "total": 300}
    output = capfd.readouterr()
    assert SECRET_TEXT not in json.dumps(house.events(job_id)) + output.out + output.err


def test_a_job_that_is_not_queued_is_left_alone(make_house: Make) -> None:
    house = make_house("works")
    job_id = house.submit()
    house.cancel(job_id)
    assert supervise(house, job_id) is False
    assert supervise(house, "job_nobody") is False
    assert supervise(house) is False


ENDS: dict[str, tuple[str, str]] = {
    "refuses": ("no_forget_probes", "no forget probe"),
    "crashes": ("ENGINE_CRASHED", "ValueError in entries.py"),
    "needs_memory": ("OUT_OF_MEMORY", "MemoryError"),
    "is_killed": ("ENGINE_LOST", "SIGKILL"),
    "aborts": ("ENGINE_LOST", "SIGABRT (signal 6)"),
    "exits": ("ENGINE_CRASHED", "exit code 7"),
    "fills_the_disk": ("DISK_FULL", "no room left"),
    "fills_the_disk_with_weights": ("DISK_FULL", "no room left"),
    "nowhere:nothing": ("ENGINE_CRASHED", "ModuleNotFoundError"),
}


@SQLITE
@pytest.mark.parametrize("entry", ENDS)
def test_bad_ends_are_told_with_a_fix(
    make_house: Make, entry: str, capfd: pytest.CaptureFixture[str]
) -> None:
    house = make_house(entry, max_attempts=1)
    job_id = house.submit()
    supervise(house, job_id)
    job = house.job(job_id)
    code, says = ENDS[entry]
    assert (job.status, job.error_code, job.checkpoint_id) == ("failed", code, None)
    assert says in (job.error_message or "")
    assert job.error_fix
    output = capfd.readouterr()
    told = f"{job.error_message} {house.events(job_id)} {output.out} {output.err}"
    assert SECRET_TEXT not in told
    with house.database.read() as session:
        assert Checkpoints(session).list().data == []
    assert not house.artefacts.exists("checkpoints")


def test_an_engine_killed_from_outside_is_a_lost_attempt(make_house: Make) -> None:
    house = make_house("is_killed", max_attempts=2)
    job_id = house.submit()
    supervise(house, job_id)
    job = house.job(job_id)
    assert (job.status, job.attempts, job.lease_worker, job.error_code) == ("queued", 1, None, None)
    assert house.events(job_id, "status")[-1]["lost"] == "ENGINE_LOST"
    supervise(house, job_id)
    assert (house.job(job_id).status, house.job(job_id).error_code) == ("failed", "ENGINE_LOST")
    assert "attempt 2 of 2" in (house.job(job_id).error_message or "")
    assert supervise(house, job_id) is False


def test_a_killed_engine_goes_on_from_its_last_training_checkpoint(make_house: Make) -> None:
    house = make_house("saves_each_step")
    job_id = house.submit()
    with running(house, job_id):
        pid = house.wait_for_pid(job_id)["pid"]
        wait_until(lambda: (house.job(job_id).step or 0) >= 5, 20, "some steps")
        os.kill(pid, signal.SIGKILL)
    assert house.job(job_id).status == "queued"
    with running(house, job_id):
        assert house.wait_for_pid(job_id, count=2)["resumed_at"] >= 5
        house.cancel(job_id)
    assert house.job(job_id).status == "cancelled"


@SQLITE
def test_an_engine_told_to_stop_by_a_stranger_is_a_lost_attempt(make_house: Make) -> None:
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    with running(house, job_id):
        os.kill(house.wait_for_pid(job_id)["pid"], signal.SIGTERM)
    job = house.job(job_id)
    assert (job.status, job.attempts) == ("queued", 1)
    assert "somebody else" in house.events(job_id, "status")[-1]["reason"]


@SQLITE
def test_a_job_over_its_time_is_stopped_with_a_training_checkpoint(make_house: Make) -> None:
    house = make_house("runs_until_stopped")
    job_id = house.submit(limits=(6.0, None))  # most of which a busy machine needs to start the engine
    supervise(house, job_id)
    job = house.job(job_id)
    assert (job.status, job.error_code) == ("failed", "TIME_LIMIT")
    assert "limits.max_seconds 6." in (job.error_message or "")
    assert saved_step(house, job_id) > 0


@SQLITE
def test_a_job_that_ignores_its_time_is_killed(make_house: Make) -> None:
    house = make_house("ignores_stop", cancel_grace_seconds=0.3)
    job_id = house.submit(limits=(6.0, None))
    supervise(house, job_id)
    assert house.job(job_id).error_code == "TIME_LIMIT"
    assert house.events(job_id, "pid")


def test_a_job_over_its_memory_is_ended(make_house: Make) -> None:
    house = make_house("grows")
    job_id = house.submit(limits=(None, 200 << 20))
    supervise(house, job_id)
    job = house.job(job_id)
    assert (job.status, job.error_code, job.attempts) == ("failed", "MEMORY_LIMIT", 1)
    held = int((job.error_message or "").split("held ")[1].split(" bytes")[0])
    assert 200 << 20 < held < 2 << 30
    assert str(200 << 20) in (job.error_message or "")
    # The method was told of it, so that its plan keeps under it.
    assert house.events(job_id, "pid")[0]["memory"] == 200 << 20


@SQLITE
def test_a_cancel_wins_over_a_limit(make_house: Make) -> None:
    house = make_house("ignores_stop", cancel_grace_seconds=1)
    job_id = house.submit(limits=(1.0, None))
    with running(house, job_id):
        house.wait_for(job_id, "running")
        house.cancel(job_id)
    assert (house.job(job_id).status, house.job(job_id).error_code) == ("cancelled", None)


@SQLITE
def test_a_file_that_changed_or_vanished_is_refused(make_house: Make) -> None:
    house = make_house("works")
    forget = house.upload("before")
    changed = house.submit(forget)
    house.artefacts.path(f"files/{forget.file}.jsonl").write_text("after")
    supervise(house, changed)
    assert house.job(changed).error_code == "file_changed"
    gone = house.submit(forget)
    house.artefacts.delete(f"files/{forget.file}.jsonl")
    supervise(house, gone)
    assert house.job(gone).error_code == "file_gone"
    assert forget.file in (house.job(gone).error_message or "")


def test_cancel_while_running(make_house: Make) -> None:
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    with running(house, job_id):
        pid = house.wait_for_pid(job_id)["pid"]
        house.cancel(job_id)
        assert house.job(job_id).status == "cancelling"
    job = house.job(job_id)
    assert (job.status, job.error_code) == ("cancelled", None)
    assert not is_alive(pid)
    # The last training checkpoint is there for a retry.
    assert saved_step(house, job_id) > 0
    assert [path.name for path in (house.settings.work_dir / job_id).glob("*/*")] == ["training"]
    assert [data["status"] for data in house.events(job_id, "status")][-2:] == ["cancelling", "cancelled"]


@SQLITE
def test_cancel_in_a_phase_that_does_not_ask(make_house: Make) -> None:
    house = make_house("evaluates_until_stopped")
    job_id = house.submit()
    with running(house, job_id):
        house.wait_for_pid(job_id)
        house.cancel(job_id)
    assert house.job(job_id).status == "cancelled"


@SQLITE
def test_an_engine_that_ignores_the_stop_is_killed_with_its_children(make_house: Make) -> None:
    house = make_house("ignores_stop", cancel_grace_seconds=0.5)
    job_id = house.submit()
    with running(house, job_id):
        pids = house.wait_for_pid(job_id)
        house.cancel(job_id)
    assert house.job(job_id).status == "cancelled"
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), 5, "the process group to end")


def test_a_stopped_worker_hands_its_job_to_the_next(make_house: Make) -> None:
    house = make_house("runs_until_stopped")
    job_id = house.submit()
    stop = threading.Event()
    with running(house, job_id, stop.is_set):
        house.wait_for_pid(job_id)
        stop.set()
    job = house.job(job_id)
    assert (job.status, job.attempts, job.lease_worker) == ("queued", 0, None)
    saved = saved_step(house, job_id)
    with running(house, job_id):
        assert house.wait_for_pid(job_id, count=2)["resumed_at"] == saved
        house.cancel(job_id)
    assert house.job(job_id).status == "cancelled"


@SQLITE
def test_an_engine_killed_from_outside_while_cancelling_is_cancelled(make_house: Make) -> None:
    house = make_house("ignores_stop")
    job_id = house.submit()
    with running(house, job_id):
        pid = house.wait_for_pid(job_id)["pid"]
        house.cancel(job_id)
        os.kill(pid, signal.SIGKILL)
    assert house.job(job_id).status == "cancelled"


def test_heartbeats_keep_a_lease_that_is_shorter_than_the_job(make_house: Make) -> None:
    house = make_house("runs_until_stopped", lease_seconds=1.5)
    job_id = house.submit()
    with running(house, job_id):
        house.wait_for_pid(job_id)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with house.database.write() as session:
                assert leases.release_expired(session, 3) == []
            time.sleep(0.1)
        house.cancel(job_id)
    assert house.job(job_id).status == "cancelled"


def test_a_worker_that_lost_its_lease_stops_its_engine_and_writes_nothing(make_house: Make) -> None:
    house = make_house("ignores_stop")
    job_id = house.submit()
    with running(house, job_id):
        pid = house.wait_for_pid(job_id)["pid"]
        take_over(house, job_id)
        before = house.job(job_id).lease_token
    job = house.job(job_id)
    assert (job.status, job.lease_worker, job.lease_token) == ("running", "worker-2", before)
    assert not is_alive(pid)


def take_over(house: House, job_id: str) -> None:
    """As if the first worker had been silent for a lease."""
    with house.database.write() as session:
        past = utc_now(session) - timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=past))
        assert [job.id for job in leases.release_expired(session, 3)] == [job_id]
        assert leases.claim(session, job_id, "worker-2", 60) is not None


def test_two_workers_one_queue(make_house: Make) -> None:
    house = make_house("works")
    ids = [house.submit() for _ in range(3)]
    took: list[Any] = []
    threads = [threading.Thread(target=lambda: took.append(supervise(house))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert took == [True, True, True]
    assert [house.job(job_id).status for job_id in ids] == ["succeeded"] * 3
    assert [house.job(job_id).attempts for job_id in ids] == [1, 1, 1]
