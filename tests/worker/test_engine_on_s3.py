"""The engine on an object store: sets come from there, the checkpoint goes there, and it waits while it is away."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import pytest

from store.checkpoints import Checkpoints
from tests.cutting import Cutter, cutting
from tests.services import wait_until
from tests.worker.conftest import SECRET_TEXT, House
from tests.worker.test_publish import engine_of
from tests.worker.test_supervisor import supervise
from worker.verdict import STORAGE_AWAY, verdict

Make = Callable[..., House]


@pytest.fixture
def cutter(s3_server: str) -> Iterator[Cutter]:
    """The way to the S3 server, which a test can cut."""
    with cutting(s3_server) as found:
        yield found


@pytest.fixture
def make_house_on_s3(make_house: Make, s3_bucket: str, cutter: Cutter) -> Make:
    def make(entry: str) -> House:
        return make_house(entry, artefacts_url=s3_bucket, s3_endpoint_url=cutter.url)

    return make


def check_published(house: House, job_id: str) -> None:
    job = house.job(job_id)
    assert (job.status, job.error_code) == ("succeeded", None)
    with house.database.read() as session:
        manifest = Checkpoints(session).get(str(job.checkpoint_id)).manifest
    for entry in manifest["files"]:
        with house.artefacts.open_read(f"checkpoints/{job.checkpoint_id}/{entry['name']}") as file:
            content = file.read()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    with house.artefacts.open_read(f"checkpoints/{job.checkpoint_id}/given.json") as file:
        assert SECRET_TEXT in file.read().decode()  # this entry writes what it was given
    assert not list(house.settings.work_dir.glob(f"{job_id}/*"))


def test_a_job_from_set_to_checkpoint(make_house_on_s3: Make) -> None:
    house = make_house_on_s3("works")
    job_id = house.submit()
    assert supervise(house, job_id)
    check_published(house, job_id)


def test_a_set_that_is_gone_or_changed_ends_the_job(make_house_on_s3: Make) -> None:
    house = make_house_on_s3("works")
    for code, act in (
        ("file_gone", house.artefacts.delete),
        ("file_changed", lambda key: overwrite(house, key)),
    ):
        forget = house.upload("before")
        job_id = house.submit(forget)
        act(f"files/{forget.file}.jsonl")
        engine_of(house, job_id)[0].run()
        assert (house.job(job_id).status, house.job(job_id).error_code) == ("failed", code)


def overwrite(house: House, key: str) -> None:
    with house.artefacts.open_write(key) as file:
        file.write(b"after")


@pytest.mark.parametrize("after", [0, 2])
def test_a_store_that_is_away_for_a_moment_is_waited_for(
    make_house_on_s3: Make, cutter: Cutter, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    """From the first connection on, or from the third: then the sets have come and the checkpoint cannot go."""
    house = make_house_on_s3("works")
    job_id = house.submit()
    engine = engine_of(house, job_id)[0]
    cutter.budgets[:] = [1 << 30] * after + [0] * 1000
    thread = threading.Thread(target=engine.run)
    thread.start()
    wait_until(lambda: "storage away" in caplog.text, 20, "the engine to notice")
    cutter.budgets.clear()
    thread.join(60)
    check_published(house, job_id)


def test_a_store_that_stays_away_costs_an_attempt_and_not_the_job(
    make_house_on_s3: Make, cutter: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.progress.RETRY_SECONDS", (0.01,))
    house = make_house_on_s3("works")
    job_id = house.submit()
    engine = engine_of(house, job_id)[0]
    cutter.budgets[:] = [0] * 1000
    assert engine.run() == STORAGE_AWAY
    assert (house.job(job_id).status, house.job(job_id).error_code) == ("running", None)
    loss = verdict(STORAGE_AWAY, None)
    assert (loss.code, loss.again) == ("ENGINE_LOST", True)


def test_whoever_lost_the_lease_leaves_nothing_there(make_house_on_s3: Make) -> None:
    house = make_house_on_s3("loses_its_lease")
    job_id = house.submit()
    supervise(house, job_id)
    assert house.job(job_id).checkpoint_id is None
    assert house.artefacts.list("checkpoints") == []
