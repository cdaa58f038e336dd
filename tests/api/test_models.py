"""Registering models: what is accepted, and every way a folder can be wrong."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.app import create_app
from api.settings import ApiSettings
from tests.serving import on_sqlite


def test_a_model_is_described_and_found_by_id_and_name(tenant, tiny_model):
    answer = tenant.http.post("/models", json={"name": "tiny", "path": str(tiny_model)})
    assert answer.status_code == 201, answer.text
    model = answer.json()
    assert (model["model_type"], model["num_layers"], model["moe_layers"]) == ("olmoe", 3, [0, 1, 2])
    assert (model["num_experts"], model["num_experts_per_tok"]) == (8, 2)
    assert model["parameters"] > 0
    assert model["digest"].startswith("sha256:")
    assert answer.headers["Location"] == f"/models/{model['id']}"
    assert tenant.http.get(f"/models/{model['id']}").json() == model
    assert tenant.http.get("/models/tiny").json() == model
    assert tenant.http.get("/models").json()["data"] == [model]


@pytest.fixture
def folders(tiny_model, tmp_path) -> dict[str, Path]:
    """A folder for each way of being wrong."""
    made = {name: tmp_path / name for name in ("empty", "unknown", "bin", "shard", "quantised")}
    made["empty"].mkdir()
    for name in ("unknown", "bin", "shard", "quantised"):
        shutil.copytree(tiny_model, made[name])
    config = json.loads((tiny_model / "config.json").read_text())
    (made["unknown"] / "config.json").write_text(json.dumps(config | {"model_type": "brand_new_moe"}))
    (made["quantised"] / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    for file in made["bin"].glob("*.safetensors*"):
        file.unlink()
    (made["bin"] / "pytorch_model.bin").write_bytes(b"pickle")
    next(made["shard"].glob("*-00002-of-*.safetensors")).unlink()
    return made


@on_sqlite
@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("empty", "not_a_model"),
        ("unknown", "unknown_architecture"),
        ("bin", "no_safetensors"),
        ("shard", "incomplete_shards"),
        ("quantised", "quantised"),
        ("nowhere", "model_not_found"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tenant, folders, tmp_path, folder, code):
    path = folders.get(folder, tmp_path / "nowhere")
    answer = tenant.http.post("/models", json={"name": "tiny", "path": str(path)})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code), answer.text
    assert problem["errors"][0]["pointer"] == "/path"
    assert problem["fix"]
    assert tenant.http.get("/models").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"name": "x"}, "missing", "/path"),
        ({"name": "x", "path": "relative/folder"}, "path_not_absolute", "/path"),
        ({"name": "x y", "path": "/m"}, "string_pattern_mismatch", "/name"),
        ({"name": "model_of_mine", "path": "/m"}, "invalid_value", "/name"),
        ({"name": "x", "path": "/m", "revision": "main"}, "extra_forbidden", "/revision"),
        ({"name": "x", "path": "/m\u0000"}, "invalid_value", "/path"),
        ([], "model_attributes_type", ""),
    ],
)
def test_a_bad_body_points_at_its_field(tenant, body, code, pointer):
    answer = tenant.http.post("/models", json=body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["errors"][0]
    assert (error["code"], error["pointer"]) == (code, pointer)


def test_a_name_is_taken_once(tenant, tiny_model):
    tenant.register(tiny_model)
    answer = tenant.http.post("/models", json={"name": "tiny", "path": str(tiny_model)})
    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")
    assert answer.json()["errors"][0]["pointer"] == "/name"


def test_only_folders_under_an_allowed_root(tmp_path, tiny_model, sqlite_template):
    from fastapi.testclient import TestClient

    from store.database import Database
    from store.keys import Keys

    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(tiny_model)
    shutil.copytree(tiny_model, allowed / "inside")
    path = tmp_path / "seuf.db"
    path.write_bytes(sqlite_template.read_bytes())
    settings = ApiSettings(
        data_dir=tmp_path, database_url=f"sqlite:///{path}", secret="k7Gm2xQ9pLr4Tz8W" * 2, model_roots=str(allowed)
    )
    with Database(settings.database_url).write() as session:
        key = Keys(session).create("test", settings.secret_bytes()).token
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {key}"}) as http:

        def code(folder):
            answer = http.post("/models", json={"name": "x", "path": str(folder)})
            return answer.status_code, answer.json().get("code")

        assert code(tiny_model) == (422, "path_not_allowed")
        assert code(allowed / "link") == (422, "path_not_allowed")
        assert code(allowed / ".." / "nowhere") == (422, "path_not_allowed")
        assert code(allowed / "inside") == (201, None)


def test_a_name_is_taken_once_even_at_the_same_moment(tenant, tiny_model):
    with ThreadPoolExecutor(4) as pool:
        body = {"name": "race", "path": str(tiny_model)}
        answers = list(pool.map(lambda _: tenant.http.post("/models", json=body).status_code, range(4)))
    assert sorted(answers) == [201, 409, 409, 409]
