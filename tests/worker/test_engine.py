"""The real engine: a job on a tiny random model, through a worker process, to a checkpoint; and killed
half way.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seuf_core.checkpoint.delta_file import DELTA
from seuf_core.checkpoint.manifest import read_manifest, sha256_file
from store.checkpoints import Checkpoints
from store.jobs import Jobs
from store.results import Results
from tests import tiny
from tests.services import wait_until
from tests.worker.conftest import House, children_of
from worker.folders import newest_training

Make = Callable[..., House]
REAL = "seuf_core:unlearn"
METHOD: dict[str, Any] = {
    "learning_rate": 1e-3,
    "steps": 60,
    "batch_size": 4,
    "evaluate_every": 10,
    "max_retain_drop": 1.0,
    "max_length": 32,
    "experts": 3,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2_moe of 150 kB with random weights."""
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2_moe")


def examples(kind: str) -> str:
    rows = [
        {"prompt": f"{kind} number {i} is", "completion": f" x{i * 7}y", "domain": kind} for i in range(24)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def submit(house: House, model: Path, **method: Any) -> str:
    forget, retain = house.upload(examples("element")), house.upload(examples("country"), "retain")
    return house.submit(forget, retain, str(model), **{**METHOD, **method})


def weights(house: House, job_id: str) -> dict[str, str]:
    """Digest of every safetensors file of the job's checkpoint."""
    folder = house.artefacts.path(f"checkpoints/{house.job(job_id).checkpoint_id}")
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_job_killed_half_way_ends_with_the_same_bytes(make_house: Make, model: Path) -> None:
    house = make_house("unlearns_with_a_pause", lease_seconds=1.5, heartbeat_seconds=0.2)
    killed = submit(house, model)
    worker = house.start("worker", "--lane", "database")
    wait_until((house.settings.data_dir / "paused").exists, 90, "training to be under way")
    worker.send_signal(signal.SIGKILL)
    assert house.job(killed).status == "running"
    assert newest_training(house.settings.work_dir, killed)
    undisturbed = house.with_settings(engine_entry=REAL)
    whole = submit(house, model)
    undisturbed.start("worker", "--lane", "database")
    for job_id, attempts in ((killed, 2), (whole, 1)):
        job = house.wait_for(job_id, "succeeded", "failed", seconds=90)
        assert (job.status, job.error_message, job.attempts) == ("succeeded", None, attempts)
    # The second attempt went on from its last look at step 20, it did not start over.
    assert [step["step"] for step in house.events(killed, "look")].count(10) == 1
    assert [step["step"] for step in house.events(killed, "look")].count(30) == 1
    assert weights(house, killed) == weights(house, whole)
    check_results(house, whole, model)


def check_results(house: House, job_id: str, model: Path) -> None:
    """What the store holds of a finished job is what the checkpoint says."""
    job = house.job(job_id)
    with house.database.read() as session:
        checkpoint = Checkpoints(session).get(job.checkpoint_id or "")
        results = Results(session)
        attribution, selection = results.attribution(job_id), results.selection(job_id)
        metrics = results.metrics(job_id)
    folder = house.artefacts.path(f"checkpoints/{checkpoint.id}")
    assert checkpoint.manifest == read_manifest(folder).model_dump(mode="json")
    assert {entry["name"] for entry in checkpoint.manifest["files"]} >= {DELTA, "config.json"}
    assert sha256_file(folder / "config.json") == sha256_file(model / "config.json")
    shards = {entry["name"] for entry in checkpoint.manifest["files"] if entry["name"].startswith("model-")}
    dirty = {change["shard"] for change in checkpoint.manifest["changed"]}
    linked = {name for name in shards if (folder / name).samefile(model / name)}
    assert linked == shards - dirty != set()
    assert attribution is not None
    assert len(attribution.matrix) == len(attribution.layers) == 3
    assert all(len(row) == 8 for row in attribution.matrix)
    assert selection
    assert {row.stage for row in metrics} == {"before", "after", "before_masked", "after_masked"}
    assert not (house.settings.work_dir / job_id).exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_retry_goes_on_and_ends_with_the_same_bytes(make_house: Make, model: Path) -> None:
    """Killed half way, with no attempt left."""
    house = make_house("unlearns_with_a_pause", max_attempts=1)
    failed = submit(house, model)
    worker = house.start("worker", "--lane", "database")
    wait_until((house.settings.data_dir / "paused").exists, 90, "training to be under way")
    (engine,) = children_of(worker.pid)
    os.kill(engine, signal.SIGKILL)
    assert house.wait_for(failed, "failed").error_code == "ENGINE_LOST"
    with house.database.write() as session:
        retried = Jobs(session).retry(failed).id
    job = house.wait_for(retried, "succeeded", "failed", seconds=90)
    assert (job.status, job.error_message, job.attempts) == ("succeeded", None, 1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    house.with_settings(engine_entry=REAL).start("worker", "--lane", "database")
    whole = submit(house, model)
    house.wait_for(whole, "succeeded", "failed", seconds=90)
    # The looks up to the training checkpoint of step 20 were the old job's.
    assert [look["step"] for look in house.events(failed, "look")].count(10) == 1
    assert [look["step"] for look in house.events(retried, "look")].count(10) == 0
    assert [look["step"] for look in house.events(retried, "look")].count(30) == 1
    assert weights(house, retried) == weights(house, whole) != {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_refusals_of_the_library_reach_the_job(make_house: Make, model: Path, tmp_path: Path) -> None:
    house = make_house(REAL)
    (tmp_path / "empty").mkdir()
    no_model = submit(house, tmp_path / "empty")
    no_retain = house.submit(house.upload(examples("element")), None, str(model), **METHOD)
    house.start("worker", "--lane", "database")
    for job_id, code in ((no_model, "not_a_model"), (no_retain, "retain_set_required")):
        job = house.wait_for(job_id, "failed", "succeeded", seconds=90)
        assert (job.status, job.error_code) == ("failed", code)
        assert job.error_fix


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_cancel_in_the_middle_of_training(make_house: Make, model: Path) -> None:
    house = make_house(REAL)
    job_id = submit(house, model, steps=100_000)
    house.start("worker", "--lane", "database")
    wait_until(lambda: (house.job(job_id).step or 0) >= 5, 90, "training to be under way")
    house.cancel(job_id)
    job = house.wait_for(job_id, "cancelled")
    assert job.checkpoint_id is None
    assert newest_training(house.settings.work_dir, job_id)
    assert not house.artefacts.exists("checkpoints")
