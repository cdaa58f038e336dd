"""/healthz and /readyz: each part is named, and only a part that requests need makes the process unready."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from api.app import create_app
from api.settings import ApiSettings
from store import duties
from store.artefacts import Artefacts
from store.database import Database, utc_now
from store.tables import Job
from tests.seeds import add_job, add_running
from tests.serving import Served

NO_BROKER = "redis://:a-password-of-the-broker@127.0.0.1:1/0"


def settings(folder: Path, database_url: str, **changes: Any) -> ApiSettings:
    """Of one API process in `folder`."""
    given = {
        "data_dir": folder,
        "database_url": database_url,
        "secret": "k7Gm2xQ9Rw4TzB6yVn8LpD3sHc5JfE1a",
        "lane": "database",
    }
    return ApiSettings(**{**given, **changes})


def answer(made: ApiSettings) -> tuple[int, str, dict[str, Any]]:
    """Status, word and parts."""
    told = TestClient(create_app(made)).get("/readyz")
    return told.status_code, told.json()["status"], told.json()["parts"]


def broken(parts: dict[str, Any]) -> list[str]:
    """The parts that do not work."""
    return [name for name, part in parts.items() if not part["ok"]]


def has_dispatcher(database: Database, seconds: float = 60) -> None:
    """Somebody has a duty, for so long from now."""
    with database.write() as session:
        duties.take(session, "release_expired", "someone", seconds)


def test_health_needs_no_key(served: Served) -> None:
    assert httpx.get(served.url + "/healthz").json()["status"] == "ok"
    told = httpx.get(served.url + "/readyz")
    assert told.status_code == 200, told.text
    assert told.json()["parts"].keys() == {"database", "storage", "dispatcher", "workers"}
    assert httpx.get(served.url + "/openapi.json").status_code == 200


def test_all_is_well(database: Database, database_url: str, tmp_path: Path) -> None:
    has_dispatcher(database)
    add_job(database)
    assert answer(settings(tmp_path, database_url))[:2] == (200, "ready")


@pytest.mark.parametrize("part", ["database", "storage"])
def test_unready_without_a_part_that_requests_need(tmp_path: Path, sqlite_template: Path, part: str) -> None:
    path = tmp_path / "seuf.db"
    if part != "database":
        path.write_bytes(sqlite_template.read_bytes())
    made = settings(tmp_path, f"sqlite:///{path}")
    app = create_app(made)
    if part == "storage":
        drafts = tmp_path / "artefacts" / ".drafts"
        drafts.rmdir()
        drafts.write_text("a file where the folder should be")
    told = TestClient(app).get("/readyz")
    assert (told.status_code, told.json()["status"]) == (503, "unready")
    assert [name for name, one in told.json()["parts"].items() if one["required"] and not one["ok"]] == [part]


def test_degraded_without_a_broker(database: Database, database_url: str, tmp_path: Path) -> None:
    has_dispatcher(database)
    status, word, parts = answer(settings(tmp_path, database_url, broker_url=NO_BROKER))
    assert (status, word, broken(parts)) == (200, "degraded", ["broker"])
    assert "password" not in str(parts)


def test_degraded_without_a_dispatcher(database: Database, database_url: str, tmp_path: Path) -> None:
    made = settings(tmp_path, database_url)
    assert answer(made)[1] == "degraded"
    assert "none was ever seen" in answer(made)[2]["dispatcher"]["detail"]
    has_dispatcher(database, seconds=-90)
    status, word, parts = answer(made)
    assert (status, word, broken(parts)) == (200, "degraded", ["dispatcher"])
    assert parts["dispatcher"]["detail"].startswith("none has been seen for ")


def test_degraded_when_jobs_wait_and_nobody_works(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    has_dispatcher(database)
    waiting = add_job(database)
    with database.write() as session:
        long_ago = utc_now(session) - timedelta(minutes=6)
        session.execute(update(Job).where(Job.id == waiting).values(created_at=long_ago))
    made = settings(tmp_path, database_url)
    assert broken(answer(made)[2]) == ["workers"]
    add_running(database)
    assert answer(made)[1:2] == ("ready",)
    assert answer(made)[2]["workers"]["detail"] == "1 at work"


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that are written."""
    written: list[str] = []
    real = Artefacts.open_write

    def noted(self: Artefacts, key: str) -> Any:
        written.append(key)
        return real(self, key)

    monkeypatch.setattr(Artefacts, "open_write", noted)
    return written


def test_the_storage_is_not_written_at_every_probe(
    tmp_path: Path, sqlite_template: Path, counting: list[str]
) -> None:
    (tmp_path / "seuf.db").write_bytes(sqlite_template.read_bytes())
    client = TestClient(create_app(settings(tmp_path, f"sqlite:///{tmp_path / 'seuf.db'}")))
    for _ in range(5):
        assert client.get("/readyz").json()["parts"]["storage"]["ok"]
    assert counting == ["health/probe"]
