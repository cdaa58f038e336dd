"""Duties: done when due, by one process, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from store.database import Database
from store.settings import Settings
from store.tables import Duty as Row
from tests.services import wait_until
from worker import duties, life
from worker.duties import DUTIES, Duty, Rota

ROOT = Path(__file__).parents[2]


def rota(database: Database, *given: Duty) -> Rota:
    return Rota(database, Settings(), given)


def test_each_duty_has_a_name_of_its_own_and_may_be_done() -> None:
    names = [duty.name for duty in DUTIES]
    assert len(set(names)) == len(names)
    assert all(0 < len(duty.name) <= 64 and duty.every_seconds > 0 for duty in DUTIES)


def test_done_again_when_due_and_not_before(database: Database) -> None:
    done: list[float] = []
    ours = rota(database, Duty("work", 0.5, lambda *_: done.append(time.monotonic())))
    since = time.monotonic()
    wait_until(lambda: ours.look() or len(done) == 3, 20, "three times")
    assert done[1] - since >= 0.5
    assert done[2] - since >= 1


def test_two_processes_do_it_in_turns_not_at_once(database: Database) -> None:
    at_work, most, done = [], [0], []
    lock = threading.Lock()

    def act(*_: object) -> None:
        with lock:
            at_work.append(1)
            most[0] = max(most[0], len(at_work))
        time.sleep(0.05)
        with lock:
            at_work.pop()
            done.append(1)

    both = [rota(database, Duty("work", 0.1, act)) for _ in range(2)]
    since = time.monotonic()
    wait_until(lambda: any(one.look() for one in both) or len(done) >= 5, 20, "five times")
    assert most == [1]
    assert time.monotonic() - since >= 0.35  # not twice as often for being two


def test_a_failure_stops_neither_the_others_nor_itself(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    def fails(*_: object) -> None:
        done.append("failed")
        raise KeyError("forget text")

    ours = rota(database, Duty("bad", 0.1, fails), Duty("good", 0.1, lambda *_: done.append("good")))
    wait_until(
        lambda: ours.look() or (done.count("failed") >= 2 and done.count("good") >= 2), 20, "both twice"
    )
    assert "duty bad failed" in caplog.text


def test_a_slow_duty_keeps_what_it_has_and_delays_nobody(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "HOLD_SECONDS", 0.4)
    monkeypatch.setattr(duties, "KEEP_SECONDS", 0.1)
    go_on, done, started = threading.Event(), list[str](), list[str]()

    def slow(*_: object) -> None:
        started.append("slow")
        go_on.wait(20)

    both = [
        rota(database, Duty("slow", 0.1, slow), Duty("quick", 0.1, lambda *_: done.append("quick")))
        for _ in "ab"
    ]
    since = time.monotonic()

    def look() -> bool:
        for one in both:
            one.look()
        return time.monotonic() - since > 1.2  # three holds

    wait_until(look, 20, "three holds")
    assert started == ["slow"]
    assert len(done) >= 3
    go_on.set()
    for one in both:
        one.close(5)
    with database.read() as session:
        assert {row.name for row in session.scalars(select(Row))} == {"slow", "quick"}


HOLDER = """
import sys, time
from store.database import Database
from store.settings import Settings
from worker.duties import Duty, Rota

def act(*_):
    print("at work", flush=True)
    time.sleep(600)

rota = Rota(Database(sys.argv[1]), Settings(), [Duty("work", 0.1, act)])
while True:
    rota.look()
    time.sleep(0.05)
"""


def test_a_holder_that_is_killed_is_replaced(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, killed in the middle of the work."""
    monkeypatch.setattr(duties, "HOLD_SECONDS", 1)
    short = HOLDER.replace("rota =", "import worker.duties; worker.duties.HOLD_SECONDS = 1; rota =")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", short, database_url], stdout=subprocess.PIPE, env=environment
    )
    done: list[float] = []
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        ours = rota(database, Duty("work", 0.1, lambda *_: done.append(time.monotonic())))
        for _ in range(5):
            ours.look()
            time.sleep(0.05)
        assert done == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    killed_at = time.monotonic()
    wait_until(lambda: ours.look() or bool(done), 20, "the next holder")
    assert done[0] - killed_at < 5


def test_a_database_that_is_away_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = Database(f"sqlite:///{tmp_path / 'no-tables.db'}")
    ours = rota(away, Duty("work", 0.1, lambda *_: None))
    ours.look()
    away.dispose()
    assert "database away" in caplog.text


def test_a_process_is_called_by_host_and_number() -> None:
    assert life.worker_id().endswith(f":{os.getpid()}")
