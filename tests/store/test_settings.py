"""Settings from the environment, and the secret on disk."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from store.ids import new_id
from store.settings import Settings


def test_defaults_run_on_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEUF_DATA_DIR", str(tmp_path))
    settings = Settings()
    assert settings.database_url == f"sqlite:///{tmp_path}/seuf.db"
    assert settings.artefacts_url == f"{tmp_path}/artefacts"
    assert (settings.lane, settings.host, settings.port) == ("database", "127.0.0.1", 8321)
    assert settings.work_dir == tmp_path / "work"


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEUF_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SEUF_DATABASE_URL", "postgresql://db/seuf")
    monkeypatch.setenv("SEUF_BROKER_URL", "redis://broker")
    monkeypatch.setenv("SEUF_LEASE_SECONDS", "30")
    settings = Settings()
    assert (settings.database_url, settings.lane) == ("postgresql://db/seuf", "celery")
    assert settings.lease_seconds == 30


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lane": "celery"}, "SEUF_BROKER_URL"),
        ({"lease_seconds": 10, "heartbeat_seconds": 6}, "SEUF_HEARTBEAT_SECONDS"),
        ({"lane": "carrier pigeon"}, "celery"),
        ({"max_upload_bytes": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate({"data_dir": tmp_path, **wrong})


def test_the_secret_is_made_once_and_only_we_can_read_it(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new")
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: settings.secret_bytes(), range(8)))
    assert len(secrets) == 1
    assert len(secrets.pop()) >= 32
    path = tmp_path / "new" / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_a_given_secret_is_used_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEUF_SECRET", "sesame-4711")
    settings = Settings(data_dir=tmp_path / "new")
    assert settings.secret_bytes() == b"sesame-4711"
    assert not (tmp_path / "new").exists()
    assert "sesame" not in repr(settings)


def test_ids_say_what_they_are_and_differ() -> None:
    ids = {new_id("job") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 24 and one.startswith("job_") for one in ids)
