"""(c) Jobs of no work on the celery lane, beside plain Celery tasks of no work on the same Redis; one worker each.

A task of Celery is a function call in a process that waits for it. A job has a process of its own, a claim, a lease, a
published checkpoint and a row for everything: the difference is what a job costs at least, whatever it does.

Figures: throughput/<jobs|tasks> a second, and throughput/seconds_per_job.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Final

from celery import Celery
from sqlalchemy import func, select

from benchmarks.chaos import parts
from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, stage
from benchmarks.service.wire import Wire
from store.tables import Job
from store.transitions import FINAL, Status

TASKS_PER_JOB: Final = 20
WAIT_SECONDS: Final = 900.0


def run(options: Options, figures: Figures, folder: Path) -> None:
    """Both on the same machine and Redis, in turn."""
    entry = "benchmarks.service.nothing:entry"
    with stage(folder / "throughput", "postgres", broker=True, ENGINE_ENTRY=entry) as service:
        service.start("dispatcher", ["worker.dispatcher"])
        service.start("worker", ["worker", "--lane", "celery"])
        broker = service.environment["SEUF_BROKER_URL"]
        command = ["celery", "-A", "benchmarks.service.nothing:app", "worker", "--loglevel", "WARNING"]
        service.start("plain", command, PLAIN_BROKER_URL=broker)
        app = Celery("plain", broker=broker)
        app.conf.update(task_default_queue="plain", task_ignore_result=True)
        body = prepare(service)
        _jobs(service, body, 2)  # both workers are there
        _tasks(app, 2)
        jobs, tasks = [], []
        for _ in range(options.repeats):
            jobs.append(_jobs(service, body, options.jobs))
            tasks.append(_tasks(app, options.jobs * TASKS_PER_JOB))
        figures.add("throughput/jobs", median(jobs), "1/s")
        figures.add("throughput/tasks", median(tasks), "1/s")
        figures.add("throughput/seconds_per_job", 1 / median(jobs), "s")


def _jobs(service: Stage, body: object, number: int) -> float:
    """Submit so many, and wait for the last of them; jobs a second."""
    wire, database = Wire(service.url, service.headers), service.database()
    ids = {wire.post("/jobs", body).json()["id"] for _ in range(number - 1)}
    began = time.monotonic()  # the queue is full: what is measured is how it empties
    ids.add(wire.post("/jobs", body).json()["id"])

    def open_jobs() -> int:
        with database.read() as session:
            query = select(func.count()).where(Job.id.in_(ids), Job.status.not_in(FINAL))
            return int(session.scalars(query).one())

    at_start = open_jobs()
    parts.wait_for(lambda: open_jobs() == 0, "the jobs", WAIT_SECONDS)
    seconds = time.monotonic() - began
    with database.read() as session:
        states = set(session.scalars(select(Job.status).where(Job.id.in_(ids))))
    assert states == {Status.SUCCEEDED}, states
    wire.close()
    database.dispose()
    return at_start / seconds


def _tasks(app: Celery, number: int) -> float:
    """The same of tasks."""
    for _ in range(number):
        app.send_task("nothing")
    with app.connection_for_read() as connection:
        channel = connection.default_channel

        def waiting() -> int:
            return int(channel.queue_declare(queue="plain", passive=False, durable=True).message_count)

        at_start, began = waiting(), time.monotonic()
        parts.wait_for(lambda: waiting() == 0, "the tasks", WAIT_SECONDS)
    return max(at_start, 1) / (time.monotonic() - began)
