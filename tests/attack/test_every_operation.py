"""schemathesis: requests made from the OpenAPI document, against a real server process with a real key.

Every operation alone, then chains of operations that hand each other ids. Nothing answers 5xx; every answer has a
status, a content type and a shape that the document names. The same requests come in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response

from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, stage

load_all_checks()
# Facts that the document cannot tell: a body may be of the right shape and name a file that is not there, or a field
# may be refused because of another one (422 with a pointer; tests/api).
# And wrong keys are themselves limited (429), which tests/api/test_auth.py knows and this check does not.
NOT_ASKED = (
    "positive_data_acceptance",
    "negative_data_rejection",
    "ensure_resource_availability",
    "ignored_auth",
)
SHORT = {"examples": 6, "chains": 15, "steps": 8}
LONG = {"examples": 60, "chains": 60, "steps": 15}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The API in a process of its own, on SQLite."""
    with stage(tmp_path_factory.mktemp("attack") / "service", "sqlite") as made:
        yield made


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    """How many requests were answered with which status, by operation."""
    return Counter()


@pytest.fixture(scope="module")
def document(service: Stage) -> Any:
    """The document, as the server gives it."""
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json", headers=service.headers)


def checks() -> list[Any]:
    """All that schemathesis knows, but those above."""
    return [check for check in CHECKS.get_all() if check.__name__ not in NOT_ASKED]


def attack(document: Any, service: Stage, seen: Counter[str], size: dict[str, int]) -> None:
    """Each operation with so many generated requests, then chains of them."""
    known = real_things(service)
    few = settings(
        max_examples=size["examples"],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    broken: list[str] = []
    for result in document.get_all_operations():
        operation = result.ok()

        @few
        @given(case=cases_of(operation), real=st.booleans())
        def one(case: Any, real: bool) -> None:
            if real:
                name_real_things(case, known)
            # One that is made up would only be refused at the door.
            case.headers = {
                name: v for name, v in (case.headers or {}).items() if name.lower() != "authorization"
            }
            answer = case.call(headers=service.headers, timeout=20)
            count(seen, case, answer)
            case.validate_response(answer, checks=checks(), headers=service.headers)

        try:
            one()
        except (Exception, FailureGroup) as error:  # all operations are asked before the test fails
            broken.append(f"{operation.label}: {told(error)}")
    assert not broken, "\n\n".join(broken)


def told(error: BaseException) -> str:
    """What failed, with every failure of a group."""
    inside = getattr(error, "exceptions", ())
    return "\n".join([str(error), *(f"  {type(one).__name__}: {one}" for one in inside)])


def cases_of(operation: Any) -> Any:
    """Requests to one operation: as the document wants them, and not as it wants them where that can be had."""
    kinds = [operation.as_strategy(generation_mode=GenerationMode.POSITIVE)]
    if operation.body or list(operation.iter_parameters()):
        kinds.append(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    return st.one_of(kinds)


def real_things(service: Stage) -> dict[str, Any]:
    """Ids of things that are there, by the name of their parameter, and the body of a job that can be had."""
    body = prepare(service)
    session = requests.Session()
    session.headers.update(service.headers)

    def made(path: str, content: Any) -> str:
        answer = session.post(f"{service.url}{path}", json=content, timeout=20)
        assert answer.ok, answer.text
        return str(answer.json()["id"])

    return {
        "job": body,
        "job_id": made("/jobs", body),
        "file_id": body["forget_set"]["file"],
        "id_or_name": "tiny",
        "upload_id": made("/uploads", {"purpose": "forget", "filename": "set.jsonl"}),
        "webhook_id": made("/webhooks", {"url": "https://example.com/hook", "events": ["job.succeeded"]}),
    }


def name_real_things(case: Any, known: dict[str, Any]) -> None:
    """Put ids that exist in the place of made-up ones."""
    for name in case.path_parameters or {}:
        if name in known:
            case.path_parameters[name] = known[name]
    if case.path in ("/jobs", "/jobs/estimate") and isinstance(case.body, dict):
        case.body = {**case.body, **known["job"]}


def count(seen: Counter[str], case: Any, answer: Response) -> None:
    """Note an answer."""
    seen[f"{case.operation.label} {answer.status_code}"] += 1


def chains(document: Any, service: Stage, seen: Counter[str], size: dict[str, int]) -> None:
    """Operations in a row: what one answers, the next one asks for."""
    machine = document.as_state_machine()

    class Chains(machine):  # type: ignore[misc, valid-type]
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"headers": service.headers, "timeout": 20}

        def after_call(self, response: Response, case: Any) -> None:
            count(seen, case, response)

        def validate_response(self, response: Response, case: Any, **_: Any) -> None:
            case.validate_response(response, checks=checks(), headers=service.headers)

    Chains.run(
        settings=settings(
            max_examples=size["chains"],
            stateful_step_count=size["steps"],
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
    )


def still_served(service: Stage) -> None:
    """The process is the one that was started, and its key still opens it."""
    assert requests.get(f"{service.url}/capabilities", headers=service.headers, timeout=20).status_code == 200
    assert service.keeper.programs["api"].starts == 1
    log = (Path(service.folder) / "api.log").read_text()
    assert "Traceback" not in log, log[-3000:]


def test_every_operation(document: Any, service: Stage, seen: Counter[str]) -> None:
    attack(document, service, seen, SHORT)
    still_served(service)
    assert sum(seen.values()) > 200


def test_chains_of_operations(document: Any, service: Stage, seen: Counter[str]) -> None:
    chains(document, service, seen, SHORT)
    still_served(service)


@pytest.mark.long
def test_two_thousand_requests(document: Any, service: Stage, seen: Counter[str]) -> None:
    before = sum(seen.values())
    attack(document, service, seen, LONG)
    chains(document, service, seen, LONG)
    still_served(service)
    assert sum(seen.values()) - before > 2000
