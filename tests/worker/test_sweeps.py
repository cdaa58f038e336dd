"""Sweeps: bytes without a row go, bytes that may still get one stay, rows without bytes are told of."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from store import checkpoints, files, leases
from store.database import utc_now
from store.fenced import FencedJob
from store.files import Files
from store.ids import new_id
from store.jobs import Jobs
from store.tables import Job
from tests.worker.conftest import House
from worker import sweeps

Make = Callable[..., House]
DAY = 86_400


def named_folder(house: House, held: FencedJob) -> str:
    """What a publish leaves between its two steps: a folder under its name, and no row."""
    key = checkpoints.artefact_key(checkpoints.id_of(held.job_id, held.token))
    folder = house.settings.data_dir / "made"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    house.artefacts.put_folder(folder, key)
    return key


def held(house: House) -> FencedJob:
    job_id = house.submit()
    with house.database.write() as session:
        claim = leases.claim(session, job_id, "worker-1", 60)
    assert claim is not None
    return FencedJob(house.database, claim.job_id, claim.token)


def test_a_checkpoint_folder_stays_as_long_as_its_row_may_come(make_house: Make) -> None:
    house = make_house("works")
    job = held(house)
    key = named_folder(house, job)
    age(house.artefacts.path(key), 2 * DAY)
    sweeps.sweep_checkpoints(house.database, house.settings)
    assert house.artefacts.exists(key)
    with job.together():
        job.publish_checkpoint(checkpoints.id_of(job.job_id, job.token), 2, {})
        job.succeed()
    sweeps.sweep_checkpoints(house.database, house.settings)
    assert house.artefacts.exists(key)


@pytest.mark.parametrize("end", ["hand_back", "fail", "lost"])
def test_a_checkpoint_folder_goes_when_its_row_can_not_come_any_more(
    make_house: Make, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    house = make_house("works")
    job, other, young = held(house), held(house), held(house)
    key, kept = named_folder(house, job), named_folder(house, other)
    ends = {
        "hand_back": job.hand_back,
        "fail": lambda: job.fail("x", "It failed.", None),
        "lost": lambda: job.lost(leases.Loss("ENGINE_LOST", "It died.", "Retry."), 3),
    }
    ends[end]()
    if end != "fail":  # and the next attempt is no reason to keep it
        with house.database.write() as session:
            assert leases.claim(session, job.job_id, "worker-2", 60) is not None
    new = named_folder(house, young)
    young.hand_back()
    for one in (key, kept):
        age(house.artefacts.path(one), 2 * DAY)
    with caplog.at_level(logging.WARNING):
        sweeps.sweep_checkpoints(house.database, house.settings)
    assert not house.artefacts.exists(key)
    assert house.artefacts.exists(kept)
    assert house.artefacts.exists(new)
    assert key in caplog.text


def age(path: Path, seconds: float) -> None:
    for one in (path, *path.rglob("*")):
        os.utime(one, (time.time() - seconds,) * 2)


def test_old_bytes_without_a_row_go(make_house: Make) -> None:
    house = make_house("works")
    kept, deleted = house.upload("kept"), house.upload("deleted")
    with house.database.write() as session:
        Files(session).delete(deleted.file)
    stray, young = files.artefact_key(new_id("file")), files.artefact_key(new_id("file"))
    part, draft = "uploads/upload_x/1", house.artefacts.path("files").parent / ".drafts" / "half"
    for key in (stray, young, part):
        with house.artefacts.open_write(key) as file:
            file.write(b"bytes")
    draft.write_text("half")
    for key in (files.artefact_key(kept.file), files.artefact_key(deleted.file), stray, "uploads/upload_x"):
        age(house.artefacts.path(key), 2 * DAY)
    age(draft, 2 * DAY)
    sweeps.sweep_files(house.database, house.settings)
    assert house.artefacts.exists(files.artefact_key(kept.file))
    assert house.artefacts.exists(young)
    for key in (files.artefact_key(deleted.file), stray, part):
        assert not house.artefacts.exists(key)
    assert not draft.exists()


@pytest.mark.parametrize("prefix", ["files", "checkpoints"])
def test_nothing_goes_on_the_database_of_another_service(
    make_house: Make, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    house = make_house("works")
    kind = {"files": "file", "checkpoints": "ckpt"}[prefix]
    keys = [f"{prefix}/{new_id(kind)}.x" for _ in range(sweeps.FEW + 1)]
    for key in keys:
        with house.artefacts.open_write(key) as file:
            file.write(b"bytes")
        age(house.artefacts.path(key), 2 * DAY)
    sweep = {"files": sweeps.sweep_files, "checkpoints": sweeps.sweep_checkpoints}[prefix]
    sweep(house.database, house.settings)
    assert all(house.artefacts.exists(key) for key in keys)
    assert "is this their database?" in caplog.text
    house.artefacts.delete(keys[0])
    sweep(house.database, house.settings)
    assert not any(house.artefacts.exists(key) for key in keys)


def test_rows_without_bytes_are_told_and_kept(make_house: Make, caplog: pytest.LogCaptureFixture) -> None:
    house = make_house("works")
    lost, there, deleted = house.upload("lost"), house.upload("there"), house.upload("deleted")
    house.artefacts.delete(files.artefact_key(lost.file))
    with house.database.write() as session:
        Files(session).delete(deleted.file)
    house.artefacts.delete(files.artefact_key(deleted.file))
    job = held(house)
    gone = checkpoints.id_of(job.job_id, job.token)
    with job.together():
        job.publish_checkpoint(gone, 2, {})
        job.succeed()
    sweeps.report_missing(house.database, house.settings)
    told = [record.getMessage() for record in caplog.records if record.name == sweeps.__name__]
    assert sorted(told) == [
        f"checkpoints/{gone} has a row but its bytes are gone",
        f"files/{lost.file}.jsonl has a row but its bytes are gone",
    ]
    with house.database.read() as session:
        assert Files(session).get(lost.file).id == lost.file
        assert Files(session).get(there.file).id == there.file


def test_work_folders_are_kept_for_a_retry_and_no_longer(make_house: Make) -> None:
    house = make_house("works", keep_work_days=7)
    jobs = {name: held(house) for name in ("running", "done", "young", "old", "retried", "old_cancelled")}
    jobs["done"].succeed()
    for name in ("young", "old", "retried"):
        jobs[name].fail("x", "It failed.", None)
    with house.database.write() as session:
        Jobs(session).request_cancel(jobs["old_cancelled"].job_id)
    jobs["old_cancelled"].hand_back()
    old = [jobs[name].job_id for name in ("old", "retried", "old_cancelled")]
    with house.database.write() as session:
        ended = utc_now(session) - timedelta(days=8)
        session.execute(update(Job).where(Job.id.in_(old)).values(finished_at=ended))
        Jobs(session).retry(jobs["retried"].job_id)
    names = {job.job_id: name for name, job in jobs.items()} | {
        "job_old_stranger": "",
        "job_stranger": "stranger",
    }
    for job_id in names:
        attempt = house.settings.work_dir / job_id / "1"
        for folder in ("training", "sets"):
            (attempt / folder).mkdir(parents=True)
        (attempt / "sets" / "forget.jsonl").write_text("what is to be forgotten")
    age(house.settings.work_dir / "job_old_stranger", 2 * DAY)
    sweeps.sweep_work(house.database, house.settings)
    left = {names[folder.name] for folder in house.settings.work_dir.iterdir()}
    assert left == {"running", "young", "retried", "stranger"}
    # A retry needs no set of the old job, and whoever deletes one wants it gone.
    sets = {names[path.parts[-4]] for path in house.settings.work_dir.glob("*/*/sets/forget.jsonl")}
    assert sets == {"running", "stranger"}
