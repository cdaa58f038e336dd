"""Settings from the environment, and the secret on disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import make_url

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


STRONG = "sesame-4711-and-some-more-characters"


def test_a_given_secret_is_used_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEUF_SECRET", STRONG)
    settings = Settings(data_dir=tmp_path / "new")
    assert settings.secret_bytes() == STRONG.encode()
    assert settings.require_secret() is settings
    assert not (tmp_path / "new").exists()
    assert "sesame" not in repr(settings)
    assert not any("sesame" in value for value in settings.environment().values())


@pytest.mark.parametrize(
    "weak",
    [
        "changeme",
        "changeme" * 5,
        "Secret-of-this-service-in-production",
        "set it to a long random string; the API keys are checked with it, so keep it",
        "a" * 64,
        "0123456701234567012345670123456701234567",
        "k7Gm2xQ9pLr4Tz8WbN5c",
    ],
)
def test_a_weak_secret_is_refused_and_not_quoted(tmp_path: Path, weak: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(data_dir=tmp_path, secret=SecretStr(weak))
    assert "SEUF_SECRET" in str(refusal.value)
    assert "openssl rand -hex 32" in str(refusal.value)
    assert weak not in str(refusal.value)


def test_a_service_of_several_processes_needs_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SEUF_SECRET_FILE.*openssl rand"):
        Settings(data_dir=tmp_path).require_secret()


def test_the_api_does_not_start_without_one(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SEUF_")}
    environment["SEUF_DATA_DIR"] = str(tmp_path)
    program = [sys.executable, "-c", "import api.main"]
    started = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert started.returncode != 0
    assert "There is no SEUF_SECRET" in started.stderr
    assert not list(tmp_path.iterdir())
    started = subprocess.run(program, env={**environment, "SEUF_SECRET": STRONG}, capture_output=True)
    assert started.returncode == 0, started.stderr


def test_secrets_come_from_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"secret": STRONG, "database_password": "p@:/", "broker_password": "hush"}.items():
        (tmp_path / name).write_text(f"{content}\n")
        monkeypatch.setenv(f"SEUF_{name.upper()}_FILE", str(tmp_path / name))
    monkeypatch.setenv("SEUF_DATABASE_URL", "postgresql://seuf@db:5432/seuf")
    monkeypatch.setenv("SEUF_BROKER_URL", "redis://redis:6379/0")
    settings = Settings(data_dir=tmp_path)
    assert settings.secret_bytes() == STRONG.encode()
    assert make_url(settings.database_url).password == "p@:/"
    assert settings.broker_url == "redis://default:hush@redis:6379/0"
    monkeypatch.setenv("SEUF_BROKER_URL", "redis://:given@redis:6379/0")
    assert Settings(data_dir=tmp_path).broker_url == "redis://:given@redis:6379/0"
    monkeypatch.setenv("SEUF_SECRET", STRONG)
    with pytest.raises(ValueError, match="SEUF_SECRET and SEUF_SECRET_FILE are both set"):
        Settings(data_dir=tmp_path)


def test_a_password_needs_its_user(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="Name the user"):
        Settings(data_dir=tmp_path, database_url="postgresql://db/x", database_password=SecretStr("p"))


def test_ids_say_what_they_are_and_differ() -> None:
    ids = {new_id("job") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 24 and one.startswith("job_") for one in ids)
