"""Estimates: nothing is created, the worker that is known is asked, and what a job would refuse is refused."""

import json
import shutil

import pytest
from sqlalchemy import select

from seuf_core.plan.estimate import estimate
from store.tables import File, Job
from tests.plan.made import UNIT
from tests.serving import finish, lines_of, on_sqlite

INLINE = [json.loads(line) for line in lines_of("forget", 30)]


def body(**changes):
    return {
        "model": "tiny",
        "forget_set": {"examples": INLINE},
        "retain_set": {"examples": INLINE},
        **changes,
    }


def test_an_estimate_creates_nothing(tenant, tiny_model):
    tenant.register(tiny_model)
    answer = tenant.http.post("/jobs/estimate", json=body(method={"experts": 2, "steps": 7}))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["experts"], found["bound"]) == ("estimate", 2, True)
    assert found["tokens_counted"] == "tokenizer"
    assert (found["seconds"], found["calibration"]) == (None, None)
    assert "No finished job" in found["seconds_missing"]
    assert found["phases"][0]["name"] == "attributing"
    assert tenant.http.get("/jobs").json()["data"] == []
    with tenant.served.database.read() as session:
        for table in (Job, File):
            assert session.scalars(select(table).where(table.tenant == tenant.name)).all() == []


def test_uploaded_sets_give_the_same_as_inline_ones(tenant, tiny_model):
    tenant.register(tiny_model)
    sets = {
        f"{p}_set": {"file": tenant.upload(p, lines_of("forget", 30))["id"]} for p in ("forget", "retain")
    }
    uploaded = tenant.http.post("/jobs/estimate", json=body(**sets)).json()
    inline = tenant.http.post("/jobs/estimate", json=body()).json()
    for shown in (uploaded, inline):
        del shown["budget_bytes"]  # what is free on this machine moves
        shown["residency_why"] = ""
    assert uploaded == inline


@on_sqlite
def test_seconds_are_those_of_the_worker_of_the_newest_finished_job(tenant, tiny_model, tmp_path):
    job = tenant.submit(tiny_model)
    held = tenant.run(job["id"])
    sets = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain")}
    for path in sets.values():
        path.write_text("\n".join(lines_of("forget", 30)))
    plan = estimate(tiny_model, sets["forget"], retain=sets["retain"], memory=10**9, calibration=UNIT)
    held.event("plan", {"plan": plan.as_dict()})
    running = tenant.http.post("/jobs/estimate", json=body()).json()
    assert running["seconds"] is None  # its worker has not shown that it can
    finish(tenant.served, held, tmp_path / "out", {"a": b"1"})
    found = tenant.http.post("/jobs/estimate", json=body()).json()
    assert (found["seconds"], found["seconds_missing"]) == (plan.seconds, None)
    assert found["budget_bytes"] == 10**9
    assert found["calibration"] == UNIT.as_dict()


@pytest.mark.parametrize(
    ("changes", "code", "pointer"),
    [
        ({"model": "nobody"}, "unknown_model", "/model"),
        ({"retain_set": None}, "retain_set_required", "/retain_set"),
        ({"forget_set": {"file": "file_aaaa"}}, "unknown_file", "/forget_set/file"),
        ({"forget_set": {"examples": [{"prompt": "only"}]}}, "missing_field", "/forget_set/examples/0"),
        ({"method": {"steps": 0}}, "greater_than_equal", "/method/steps"),
    ],
)
@on_sqlite
def test_what_a_job_would_refuse_is_refused(tenant, tiny_model, changes, code, pointer):
    tenant.register(tiny_model)
    wanted = {name: value for name, value in body(**changes).items() if value is not None}
    problem = tenant.http.post("/jobs/estimate", json=wanted).json()
    assert problem["status"] == 422
    assert (problem["errors"][0]["pointer"], problem["errors"][0]["code"]) == (pointer, code)


@on_sqlite
def test_a_model_that_is_gone_is_said(tenant, tiny_model, tmp_path):
    tenant.register(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    problem = tenant.http.post("/jobs/estimate", json=body()).json()
    assert (problem["code"], problem["errors"][0]["pointer"]) == ("model_not_found", "/model")
