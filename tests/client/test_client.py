"""The client against the real API: answers, errors, and what it does on a network that breaks."""

import json
import threading
import typing

import pytest

from client import ApiError, Client, UnreachableError, types
from tests.cutting import cutting
from tests.services import free_port
from tests.serving import finish, lines_of


@pytest.fixture
def client(tenant):
    with Client(tenant.served.url, tenant.key) as opened:
        yield opened


@pytest.fixture
def sets(tmp_path):
    """Paths of a valid forget, retain and evaluation set."""
    paths = {}
    for purpose in ("forget", "retain", "evaluation"):
        paths[purpose] = tmp_path / f"{purpose}.jsonl"
        paths[purpose].write_text("\n".join(lines_of(purpose)))
    return paths


def test_every_method_from_upload_to_download(client, tenant, tiny_model, sets, tmp_path):
    files = {purpose: client.upload(path, purpose) for purpose, path in sets.items()}
    assert client.file(files["forget"]["id"]) == files["forget"]
    assert len(client.files(limit=2)["data"]) == 2
    model = client.register_model("tiny", tiny_model)
    assert client.model("tiny") == model
    assert client.models()["data"] == [model]
    retain = [json.loads(line) for line in lines_of("retain")]
    planned = client.estimate(
        "tiny",
        files["forget"]["id"],
        retain_set=retain,
        evaluation_set=files["evaluation"]["id"],
        method={"steps": 3},
    )
    assert (planned["object"], planned["seconds"]) == ("estimate", None)
    assert planned.keys() == types.Estimate.__annotations__.keys()
    assert planned["phases"][0].keys() == types.PlannedPhase.__annotations__.keys()
    assert client.jobs()["data"] == []
    job = client.submit(
        "tiny",
        files["forget"]["id"],
        retain_set=retain,
        evaluation_set=files["evaluation"]["id"],
        method={"steps": 3},
        metadata={"ticket": "1"},
    )
    assert job["method"]["steps"] == 3
    assert client.job(job["id"]) == job
    assert client.jobs(status="queued", model="tiny")["data"] == [job]
    made = finish(tenant.served, tenant.run(job["id"]), tmp_path / "made", {"a.bin": b"abc"})
    assert [event["seq"] for event in client.events(job["id"])] == [1, 2, 3]
    assert client.attribution(job["id"])["layers"] == [0, 2]
    assert client.heatmap(job["id"]).startswith("<svg")
    assert client.metrics(job["id"])["data"][0]["value"] == 0.9
    assert client.checkpoint(made)["job"] == job["id"]
    folder = client.download(made, tmp_path / "unlearned")
    assert (folder / "a.bin").read_bytes() == b"abc"
    assert client.capabilities()["architectures"]
    assert client.ready()["parts"]["database"]["ok"]
    with pytest.raises(ApiError) as refused:
        client.cancel(job["id"])
    assert (refused.value.status, refused.value.code) == (409, "transition_refused")
    client.delete_file(files["forget"]["id"])
    with pytest.raises(ApiError, match="was deleted at"):
        client.file(files["forget"]["id"])


@pytest.mark.parametrize(
    ("schema", "shape"),
    [
        ("File", types.File),
        ("Part", types.Part),
        ("Upload", types.Upload),
        ("Model", types.Model),
        ("Job", types.Job),
        ("Progress", types.Progress),
        ("Event", types.Event),
        ("Attribution", types.Attribution),
        ("Metric", types.Metric),
        ("Metrics", types.Metrics),
        ("Checkpoint", types.Checkpoint),
        ("CheckpointFile", types.CheckpointFile),
        ("JobCreate", types.Submit),
        ("Estimate", types.Estimate),
        ("PlannedPhase", types.PlannedPhase),
    ],
)
def test_the_typed_answers_are_those_of_the_api(tenant, schema, shape):
    document = tenant.http.get("/openapi.json").json()
    assert set(typing.get_type_hints(shape)) == set(document["components"]["schemas"][schema]["properties"])


def test_a_refusal_carries_the_problem(client, sets):
    sets["forget"].write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(ApiError) as refused:
        client.upload(sets["forget"], "forget")
    error = refused.value
    assert (error.status, error.code, error.errors[0]["line"]) == (422, "invalid_examples", 2)
    assert error.fix
    assert error.request_id.startswith("req_")


def test_a_wrong_key(tenant):
    with Client(tenant.served.url, "seuf_wrong") as stranger, pytest.raises(ApiError) as refused:
        stranger.jobs()
    assert refused.value.code == "invalid_key"


def test_nothing_listens(monkeypatch):
    monkeypatch.setattr("client.client.RETRIES", 1)
    with Client(f"http://127.0.0.1:{free_port()}", "k") as lonely, pytest.raises(UnreachableError) as failed:
        lonely.jobs()
    assert "seuf up" in failed.value.fix


def test_a_get_is_repeated_over_a_broken_connection(tenant):
    with cutting(tenant.served.url, 0, 60) as cutter, Client(cutter.url, tenant.key) as client:
        assert client.jobs()["data"] == []
        assert cutter.connections == 3


def test_what_is_created_is_created_once_over_broken_connections(tenant, tiny_model):
    # The first answer breaks off in its head, the second before it begins: both were given all the same.
    with cutting(tenant.served.url, 60, 0) as cutter, Client(cutter.url, tenant.key) as client:
        model = client.register_model("once", tiny_model)
        assert cutter.connections == 3
    with cutting(tenant.served.url, 60) as cutter, Client(cutter.url, tenant.key) as client:
        job = client.submit(model["id"], [{"text": "Ada."}], retain_set=[{"text": "Bo."}])
        assert cutter.connections == 2
        assert client.models()["data"] == [model]
        assert client.jobs()["data"] == [job]


def test_what_has_no_key_is_not_repeated(tenant, tiny_model):
    job = tenant.submit(tiny_model)["id"]
    with cutting(tenant.served.url, 60) as cutter, Client(cutter.url, tenant.key) as client:
        with pytest.raises(UnreachableError):
            client.cancel(job)
        assert cutter.connections == 1


def test_events_survive_cut_connections_without_gap_or_repeat(tenant, tiny_model):
    job = tenant.submit(tiny_model)["id"]
    held = tenant.run(job)
    for step in range(30):
        held.step(step, 1.0, None, {"step": step})
    with cutting(tenant.served.url, 700, 1500, 2500) as cutter, Client(cutter.url, tenant.key) as client:
        events = client.events(job)
        seen = [next(events)["seq"] for _ in range(32)]
        threading.Timer(0.3, lambda: held.fail("x", "y", None)).start()
        seen += [event["seq"] for event in events]
        assert cutter.connections >= 4
    assert seen == list(range(1, 34))


def test_events_can_be_taken_up_later(client, tenant, tiny_model):
    job = tenant.submit(tiny_model)["id"]
    client.cancel(job)
    assert [event["seq"] for event in client.events(job, after=1)] == [2]
    assert list(client.events(job, after=2)) == []
    with pytest.raises(ApiError, match="There is no job"):
        next(client.events("job_nobody"))
