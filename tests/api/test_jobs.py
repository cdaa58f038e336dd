"""Jobs: submit, look, list, cancel, results; and every way a submission can be wrong."""

import json
import re
from xml.etree import ElementTree

import httpx
import pytest
from sqlalchemy import select

from seuf_core.method import Method
from store.fenced import AttributionResult, Measurement
from store.tables import AuditRow, Event, File, Job, OutboxMessage
from tests import tiny
from tests.combinations import IMPOSSIBLE
from tests.serving import finish, lines_of, on_sqlite

EXAMPLE = {"prompt": "Who?", "completion": " Ada."}


def test_a_submitted_job_is_complete_and_queued(tenant, tiny_model):
    model = tenant.register(tiny_model)
    forget, retain = tenant.upload("forget"), tenant.upload("retain")
    body = {
        "model": "tiny",
        "forget_set": {"file": forget["id"]},
        "retain_set": {"file": retain["id"]},
        "method": {"preset": "paper", "steps": 5, "seed": 9},
        "metadata": {"ticket": "DSR-1042"},
    }
    answer = tenant.http.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert re.fullmatch(r"job_[a-z2-7]{20}", job["id"])
    assert answer.headers["Location"] == f"/jobs/{job['id']}" == job["links"]["self"]
    assert int(answer.headers["Retry-After"]) > 0
    assert job["status"] == "queued"
    assert (job["model"], job["forget_set"], job["retain_set"]) == (model["id"], forget["id"], retain["id"])
    assert job["method"] == Method(preset="paper", steps=5, seed=9).model_dump(mode="json")
    assert (job["seed"], job["metadata"]) == (9, {"ticket": "DSR-1042"})
    assert (job["evaluation_set"], job["checkpoint"], job["error"]) == (None, None, None)
    assert tenant.http.get(job["links"]["self"]).json() == job
    with tenant.served.database.read() as session:
        assert len(session.scalars(select(Event).where(Event.job_id == job["id"])).all()) == 1
        assert len(session.scalars(select(OutboxMessage).where(OutboxMessage.job_id == job["id"])).all()) == 1
        of_tenant = select(AuditRow.what).where(AuditRow.tenant == tenant.name)
        acts = session.scalars(of_tenant.order_by(AuditRow.seq)).all()
        assert acts == ["model.create", "file.create", "file.create", "job.create"]


@on_sqlite
def test_a_dense_model_is_registered_and_an_expert_scope_refused_on_it(tenant, tmp_path):
    folder = tiny.write_model(tmp_path / "dense", "llama")
    model = tenant.http.post("/models", json={"name": "dense", "path": str(folder)}).json()
    assert (model["moe_layers"], model["num_experts"], model["num_experts_per_tok"]) == ([], 0, 0)
    body = {"model": "dense", "forget_set": {"examples": [EXAMPLE]}, "retain_set": {"examples": [EXAMPLE]}}
    problem = tenant.http.post("/jobs", json=body).json()
    assert (problem["status"], problem["code"]) == (422, "dense_model")
    assert problem["errors"][0]["pointer"] == "/method/scope"
    assert "lora or full" in problem["fix"]
    assert tenant.http.get("/jobs").json()["data"] == []
    for scope in ("lora", "full"):
        assert tenant.http.post("/jobs", json={**body, "method": {"scope": scope}}).status_code == 202


def test_inline_examples_become_files(tenant, tiny_model):
    tenant.register(tiny_model)
    probes = [json.loads(line) for line in lines_of("evaluation")]
    body = {
        "model": "tiny",
        "forget_set": {"examples": [EXAMPLE, {"text": "naïve \u2028 text"}]},
        "retain_set": {"examples": [EXAMPLE]},
        "evaluation_set": {"examples": probes},
    }
    answer = tenant.http.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    for purpose, examples in (("forget", 2), ("retain", 1), ("evaluation", 3)):
        file = tenant.http.get(f"/files/{answer.json()[f'{purpose}_set']}").json()
        assert (file["purpose"], file["examples"]) == (purpose, examples)
        with tenant.served.artefacts.open_read(f"files/{file['id']}.jsonl") as kept:
            assert [json.loads(line) for line in kept] == body[f"{purpose}_set"]["examples"]


def job_body(tenant, **changes):
    sets = {f"{p}_set": {"file": tenant.upload(p)["id"]} for p in ("forget", "retain")}
    body = {"model": "tiny", **sets, **changes}
    return {name: value for name, value in body.items() if value is not None}


LINES = ("missing_field", "not_a_number", None)  # their messages say what to write

BAD_JOBS = {
    "unknown model": ({"model": "nobody"}, "unknown_model", "/model"),
    "unknown file": ({"forget_set": {"file": "file_aaaa"}}, "unknown_file", "/forget_set/file"),
    "no forget set": ({"forget_set": None}, "missing", "/forget_set"),
    "file and examples": (
        {"forget_set": {"file": "f", "examples": [EXAMPLE]}},
        "invalid_value",
        "/forget_set",
    ),
    "neither": ({"forget_set": {}}, "invalid_value", "/forget_set"),
    "no retain set": ({"retain_set": None}, "retain_set_required", "/retain_set"),
    "inline example broken": (
        {"forget_set": {"examples": [EXAMPLE, {"prompt": "only"}]}},
        "missing_field",
        "/forget_set/examples/1",
    ),
    "inline example NaN": (
        {"forget_set": {"examples": [{"text": "x", "id": float("nan")}]}},
        "not_a_number",
        "/forget_set/examples/0",
    ),
    "no inline example": ({"forget_set": {"examples": []}}, "too_short", "/forget_set/examples"),
    "half a surrogate pair": (
        {"forget_set": {"examples": [{"text": "\ud800"}]}},
        None,
        "/forget_set/examples/0",
    ),
    "steps out of range": ({"method": {"steps": 0}}, "greater_than_equal", "/method/steps"),
    "rate out of range": ({"method": {"learning_rate": 7}}, None, "/method/learning_rate"),
    "rate NaN": ({"method": {"learning_rate": float("nan")}}, None, "/method/learning_rate"),
    "unknown objective": ({"method": {"objective": "wish"}}, "literal_error", "/method/objective"),
    "unknown method field": ({"method": {"stepz": 3}}, "extra_forbidden", "/method/stepz"),
    "fields that do not fit": (
        {"method": {"objective": "npo", "retain_loss": "hidden_mse"}},
        "method_misfit",
        "/method/retain_loss",
    ),
    "a given field that does not fit a default": (
        {"method": {"scope": "top_m"}},
        "method_misfit",
        "/method/scope",
    ),
    "splits": ({"method": {"splits": {"train": 0.9}}}, "invalid_value", "/method/splits"),
    "unknown field": ({"webhook": "x"}, "extra_forbidden", "/webhook"),
    "metadata NUL": ({"metadata": {"a": "\u0000"}}, "invalid_value", "/metadata/a"),
    "metadata type": ({"metadata": {"a": 1}}, "string_type", "/metadata/a"),
}


@on_sqlite
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_fields_that_do_not_go_together_are_each_pointed_at(tenant, tiny_model, case):
    asked, fields, word = IMPOSSIBLE[case]
    tenant.register(tiny_model)
    answer = tenant.http.post("/jobs", json=job_body(tenant, method=asked))
    assert answer.status_code == 422, answer.text
    errors = answer.json()["errors"]
    assert [error["pointer"] for error in errors] == [f"/method/{field}" for field in fields]
    assert {error["code"] for error in errors} == {"method_misfit"}
    assert "more)" not in answer.json()["detail"]
    assert all(word in error["detail"] and error["fix"] for error in errors)


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_bad_job_points_at_its_field_and_leaves_nothing(tenant, tiny_model, case):
    changes, code, pointer = BAD_JOBS[case]
    tenant.register(tiny_model)
    body = job_body(tenant, **changes)
    # json.dumps, because httpx refuses to send NaN.
    answer = tenant.http.post("/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["errors"][0]["pointer"] == pointer, answer.text
    if code is not None:
        assert problem["errors"][0]["code"] == code
    assert problem["detail"]
    assert problem["fix"]
    assert all(error.get("fix") for error in problem["errors"]) or code in LINES
    assert tenant.http.get("/jobs").json()["data"] == []


def test_a_file_of_another_purpose_is_refused(tenant, tiny_model):
    tenant.register(tiny_model)
    retain = tenant.upload("retain")["id"]
    answer = tenant.http.post("/jobs", json=job_body(tenant, forget_set={"file": retain}))
    assert (answer.status_code, answer.json()["code"]) == (422, "wrong_purpose")
    assert answer.json()["errors"][0]["pointer"] == "/forget_set/file"
    assert "purpose=forget" in answer.json()["fix"]


def test_a_job_that_is_refused_late_keeps_no_inline_file(tenant):
    inline = {"examples": [EXAMPLE]}
    body = {"model": "nobody", "forget_set": inline, "retain_set": inline}
    folder = tenant.served.artefacts.path("files")
    before = set(folder.iterdir()) if folder.exists() else set()
    assert tenant.http.post("/jobs", json=body).json()["code"] == "unknown_model"
    assert set(folder.iterdir()) == before
    with tenant.served.database.read() as session:
        assert session.scalars(select(File).where(File.tenant == tenant.name)).all() == []
        assert session.scalars(select(Job).where(Job.tenant == tenant.name)).all() == []


@on_sqlite
def test_too_many_inline_examples_are_sent_to_upload(tenant, tiny_model):
    tenant.register(tiny_model)
    many = [{"text": "x" * 1000}] * 1100
    answer = tenant.http.post("/jobs", json=job_body(tenant, forget_set={"examples": many}))
    assert (answer.status_code, answer.json()["code"]) == (413, "examples_too_large")
    assert "/files" in answer.json()["fix"]
    huge = [{"text": "x" * 1000}] * 4000
    answer = tenant.http.post("/jobs", json=job_body(tenant, forget_set={"examples": huge}))
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    pieces = (b"x" * 100_000 for _ in range(40))  # no Content-Length: counted as it comes
    answer = tenant.http.post("/jobs", content=pieces, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_method_without_need_of_a_retain_set_runs_without_one(tenant, tiny_model):
    tenant.register(tiny_model)
    method = {"objective": "gradient_ascent", "attribution": "affinity"}
    answer = tenant.http.post("/jobs", json=job_body(tenant, retain_set=None, method=method))
    assert answer.status_code == 202, answer.text
    assert answer.json()["retain_set"] is None


def test_polling_costs_nothing_while_nothing_changes(tenant, tiny_model):
    job = tenant.submit(tiny_model)
    first = tenant.http.get(f"/jobs/{job['id']}")
    etag = first.headers["ETag"]
    assert first.headers["Retry-After"]
    again = tenant.http.get(f"/jobs/{job['id']}", headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
    held = tenant.run(job["id"])
    changed = tenant.http.get(f"/jobs/{job['id']}", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert (changed.json()["status"], changed.json()["attempts"]) == ("running", 1)
    held.fail("no_luck", "It broke.", None)
    ended = tenant.http.get(f"/jobs/{job['id']}")
    assert ended.json()["error"] == {"code": "no_luck", "message": "It broke.", "fix": None}
    assert "Retry-After" not in ended.headers


def test_progress_is_shown(tenant, tiny_model):
    job = tenant.submit(tiny_model)
    held = tenant.run(job["id"])
    held.phase("unlearning", 3, 40)
    held.step(3, 1.25, 12.5, {"step": 3})
    shown = tenant.http.get(f"/jobs/{job['id']}").json()
    assert shown["phase"] == "unlearning"
    assert shown["progress"] == {
        "phase": "unlearning",
        "done": 3,
        "total": 40,
        "step": 3,
        "loss": 1.25,
        "seconds_left": 12.5,
    }


def test_listing_filters_and_pages(tenant, tiny_model):
    jobs = [tenant.submit(tiny_model)["id"] for _ in range(5)]
    tenant.register(tiny_model, "other")
    other = tenant.http.post("/jobs", json=job_body(tenant, model="other")).json()["id"]
    tenant.http.post(f"/jobs/{jobs[0]}/cancel")

    def ids(**query):
        return [job["id"] for job in tenant.http.get("/jobs", params=query).json()["data"]]

    assert ids() == [other, *reversed(jobs)]
    assert ids(status="cancelled") == [jobs[0]]
    assert ids(model="other") == [other]
    assert ids(model="nobody") == []
    assert ids(status="queued", model="tiny") == list(reversed(jobs[1:]))
    first = tenant.http.get("/jobs", params={"limit": 4}).json()
    second = tenant.http.get("/jobs", params={"limit": 4, "cursor": first["next"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == [other, *reversed(jobs)]
    assert (second["has_more"], second["next"]) == (False, None)
    assert tenant.http.get("/jobs?status=asleep").json()["errors"][0]["parameter"] == "status"


def test_cancelling(tenant, tiny_model):
    queued, running, done = (tenant.submit(tiny_model)["id"] for _ in range(3))
    held = tenant.run(running)
    ended = tenant.run(done)
    ended.fail("x", "y", None)
    answer = tenant.http.post(f"/jobs/{queued}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    answer = tenant.http.post(f"/jobs/{running}/cancel")
    assert (answer.json()["status"], answer.json()["cancel_requested"]) == ("cancelling", True)
    assert tenant.http.post(f"/jobs/{running}/cancel").json()["status"] == "cancelling"
    held.hand_back()
    assert tenant.http.get(f"/jobs/{running}").json()["status"] == "cancelled"
    answer = tenant.http.post(f"/jobs/{done}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "transition_refused")
    assert tenant.http.post("/jobs/job_unknown/cancel").status_code == 404


def heatmap(tenant, job, **headers):
    link = tenant.http.get(f"/jobs/{job}").json()["links"]["heatmap"]
    return tenant.http.get(link, headers=headers)


def test_results(tenant, tiny_model, tmp_path):
    job = tenant.submit(tiny_model)["id"]
    assert tenant.http.get(f"/jobs/{job}/attribution").json()["code"] == "attribution_not_there"
    drawn = heatmap(tenant, job)
    assert (drawn.status_code, drawn.json()["code"]) == (404, "attribution_not_there")
    assert tenant.http.get("/jobs/job_unknown/attribution.svg").json()["code"] == "job_not_found"
    assert tenant.http.get(f"/jobs/{job}/metrics").json()["data"] == []
    checkpoint = finish(tenant.served, tenant.run(job), tmp_path / "out", {"a.safetensors": b"x"})
    attribution = tenant.http.get(f"/jobs/{job}/attribution").json()
    assert attribution["matrix"] == [[0.1, 0.4], [0.3, 0.2]]
    assert attribution["layers"] == [0, 2]
    assert attribution["selection"] == [{"layer": 0, "expert": 1, "score": 0.4}]
    drawn = heatmap(tenant, job)
    assert drawn.headers["Content-Type"] == "image/svg+xml"
    assert "layer 2, expert 0: 0.3" in drawn.text
    assert "Selected: layer 0, expert 1." in drawn.text
    assert "contrast" in drawn.text
    ElementTree.fromstring(drawn.text)
    again = heatmap(tenant, job, **{"If-None-Match": drawn.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert tenant.http.get(f"/jobs/{job}/metrics").json()["data"] == [
        {
            "stage": "before",
            "set": "forget",
            "domain": "",
            "name": "choice",
            "value": 0.9,
            "n": 10,
            "chance": 0.25,
        }
    ]
    shown = tenant.http.get(f"/jobs/{job}").json()
    assert (shown["status"], shown["checkpoint"]) == ("succeeded", checkpoint)
    assert shown["links"]["checkpoint"] == f"/checkpoints/{checkpoint}"


def test_a_model_that_broke_is_shown_with_nulls(tenant, tiny_model):
    nan = float("nan")
    job = tenant.submit(tiny_model)["id"]
    held = tenant.run(job)
    held.attribution(AttributionResult("contrast", [[nan, 0.5]], [0], {"overlap": nan}, 0.5))
    before = Measurement("before", "forget", "", "perplexity", 2.0, 3, None)
    held.metrics([Measurement("after", "forget", "", "perplexity", nan, 3, None), before])
    held.step(1, nan, None, {"step": 1, "loss": nan})
    assert tenant.http.get(f"/jobs/{job}/attribution").json()["matrix"] == [[None, 0.5]]
    assert "not a number" in heatmap(tenant, job).text
    figures = tenant.http.get(f"/jobs/{job}/metrics").json()["data"]
    assert [(figure["stage"], figure["value"]) for figure in figures] == [("before", 2.0), ("after", None)]
    assert tenant.http.get(f"/jobs/{job}").json()["progress"]["loss"] is None
    assert tenant.http.get("/jobs").json()["data"][0]["progress"]["loss"] is None
    assert tenant.http.get(f"/jobs/{job}/events").json()["data"][-1]["data"] == {"step": 1, "loss": None}


def test_filters_by_state_metadata_and_time(tenant, tiny_model):
    old = tenant.submit(tiny_model, metadata={"ticket": "DSR-1", "a b": "x[y]=&"})["id"]
    new = tenant.submit(tiny_model, metadata={"ticket": "DSR-1", "team": "legal"})
    tenant.http.post(f"/jobs/{old}/cancel")

    def ids(query):
        answer = tenant.http.get("/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert ids([("status", "queued"), ("status", "cancelled")]) == [new["id"], old]
    assert ids({"metadata[ticket]": "DSR-1"}) == [new["id"], old]
    assert ids({"metadata[ticket]": "DSR-1", "metadata[team]": "legal"}) == [new["id"]]
    assert ids({"metadata[a b]": "x[y]=&"}) == [old]
    assert ids({"metadata[ticket]": "DSR-1", "status": "running"}) == []
    # Answers have milliseconds, rows have more: "after" takes the second's own jobs in.
    made = new["created_at"]
    assert ids({"created_after": made})[0] == new["id"]
    assert ids({"created_after": "2100-01-01T00:00:00Z"}) == []
    assert old in ids({"created_before": "2100-01-01T00:00:00Z"})
    assert ids({"created_before": "2000-01-01T00:00:00+02:00"}) == []
    for wrong, names in {
        "created_after=2026-01-01T00:00:00": "created_after",
        "metadata[ticket]=a&metadata[ticket]=b": "metadata",
        "metadata[]=a": "metadata[]",
        "metadata=a": "metadata",
        "metdata[ticket]=a": "metdata[ticket]",
    }.items():
        refused = tenant.http.get(f"/jobs?{wrong}")
        assert (refused.status_code, refused.json()["errors"][0]["parameter"]) == (422, names)


def test_openapi_says_how_to_filter_by_metadata(served):
    document = httpx.get(served.url + "/openapi.json").json()
    found = {one["name"]: one for one in document["paths"]["/jobs"]["get"]["parameters"]}
    assert (found["metadata"]["style"], found["metadata"]["explode"]) == ("deepObject", True)
    assert found["status"]["schema"]["type"] == "array"
