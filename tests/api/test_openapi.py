"""The OpenAPI document: complete, with examples that are true, and errors in our shape only."""

import typing

import httpx
import pytest

from api import schemas
from api.app import create_app
from api.docs import ProblemDetails
from seuf_core import method
from seuf_core.method import Method


@pytest.fixture(scope="module")
def document(served):
    return create_app(served.settings).openapi()


def operations(document):
    for path, methods in document["paths"].items():
        for verb, operation in methods.items():
            yield f"{verb.upper()} {path}", operation


def test_every_operation_is_described_and_shows_its_errors(document):
    for name, operation in operations(document):
        assert operation["description"], name
        if operation["tags"] == ["service"] and "capabilities" not in name:
            continue
        assert operation["security"], name
        assert "401" in operation["responses"], name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                content = response["content"]
                assert content.keys() == {"application/problem+json"}, (name, status)
                body = content["application/problem+json"]
                assert body["schema"] == {"$ref": "#/components/schemas/ProblemDetails"}
                assert body["example"]["status"] == int(status)
                ProblemDetails.model_validate(body["example"])


def test_every_body_has_an_example(document):
    bodies = [operation["requestBody"] for _, operation in operations(document) if "requestBody" in operation]
    assert len(bodies) >= 6
    for body in bodies:
        (content,) = body["content"].values()
        # (A body that may be left out is one of two.)
        name = (content["schema"].get("anyOf") or [content["schema"]])[0].get("$ref", "").rpartition("/")[2]
        assert content.get("example") or content.get("examples") or document["components"]["schemas"][name]["examples"]


def test_the_examples_are_accepted_by_their_own_schemas():
    for model in (schemas.ModelCreate, schemas.JobCreate, schemas.ExampleSet, Method):
        for example in model.model_config["json_schema_extra"]["examples"]:
            model.model_validate(example)


def test_a_method_may_leave_everything_to_its_preset(document):
    assert "required" not in document["components"]["schemas"]["Method"]
    assert document["components"]["schemas"]["Method"]["additionalProperties"] is False
    names = {"HTTPValidationError", "ValidationError"}
    assert not names & document["components"]["schemas"].keys()


def test_capabilities_say_what_is_true(tenant):
    shown = tenant.http.get("/capabilities").json()
    assert {"olmoe", "mixtral", "qwen3_moe"} <= set(shown["architectures"])
    choices = {
        "objectives": method.Objective,
        "scopes": method.Scope,
        "attributions": method.Attribution,
        "spreads": method.Spread,
        "router_modes": method.RouterMode,
        "retain_losses": method.RetainLoss,
    }
    assert {name: tuple(shown[name]) for name in choices} == {
        name: typing.get_args(choice) for name, choice in choices.items()
    }
    assert shown["presets"].keys() == {"default", "paper"}
    assert shown["limits"]["upload_bytes"] == tenant.served.settings.max_upload_bytes
    assert shown["method_schema"]["properties"]["steps"]["minimum"] == 1


def test_the_docs_page_is_served(served):
    assert "openapi.json" in httpx.get(served.url + "/docs").text
