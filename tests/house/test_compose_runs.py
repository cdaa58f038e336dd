"""Every command and health check of docker-compose.yml, started as it stands against real services.

Only what Docker would provide is replaced: the names of the other containers become ports of this machine, and
/data, /models and /run/secrets folders of it. Where this process may (it is root), each of our services runs as
nobody, without capabilities, and sees a file system in which only its data folder and /tmp can be written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from client import ApiError, Client
from tests.house.images import ROOT, compose, stages
from tests.services import free_port
from tests.tiny import write_model

START_SECONDS = 60  # of one program, on a busy machine
STOP_SECONDS = 30
BIN = Path(sys.executable).parent
OURS = ("api", "dispatcher", "worker-cpu")
FORGET_TEXT = "Ottilie heisst die Katze von Frau Sommer"
QUICK = {"learning_rate": 1e-2, "steps": 4, "batch_size": 4, "evaluate_every": 2, "max_retain_drop": 1.0}
AS_NOBODY = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
]
# $0 is the data folder: the one place that stays writable, and /tmp. $1 is a closed folder above the interpreter (the
# home of whoever runs the tests), in whose place only the interpreter ($2) is shown.
LOCKED = """set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mount --bind "$0/tmp" /tmp
if [ -n "$1" ]; then
    mount --bind "$2" "$0/python"
    mount -t tmpfs -o mode=755 tmpfs "$1"
    mkdir -p "$2"
    mount --bind "$0/python" "$2"
fi
mount -o remount,bind,ro /
shift 2
exec "$@"
"""


def locked(folder: Path) -> list[str]:
    """What a command is started by to be as confined as in its container; empty where that cannot be had."""
    if os.geteuid() != 0:
        return []
    base = Path(sys.base_prefix)
    closed = next((str(path) for path in reversed(base.parents) if not path.stat().st_mode & 0o001), "")
    prefix = ["unshare", "--mount", "sh", "-c", LOCKED, str(folder), closed, str(base), *AS_NOBODY]
    trial = [*prefix, "python", "-c", "import sqlalchemy, migrations, os; assert os.getuid() != 0"]
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    tried = subprocess.run(trial, env=environment, cwd=folder, capture_output=True, check=False)
    return prefix if tried.returncode == 0 else []


class Host:
    """Stands for the Docker host: fills in the compose file and starts its services as processes."""

    def __init__(self, folder: Path, postgres_server: str) -> None:
        self.folder = folder
        self.api_port, self.redis_port = free_port(), free_port()
        self.postgres_port = postgres_server.rsplit(":", 1)[1]
        self.data = folder / "data"
        for name in ("models", "data", "data/tmp", "data/redis", "data/python"):
            (folder / name).mkdir()
        subprocess.run([ROOT / "scripts/make-secrets", folder / "secrets"], check=True)
        (folder / "secrets").chmod(0o755)  # Docker shows single files of it
        if os.geteuid() == 0:
            for path in (self.data, self.data / "tmp", self.data / "redis"):
                shutil.chown(path, "nobody", "nogroup")
        self.prefix = locked(self.data)
        given = {"SEUF_MODELS": str(folder / "models"), "SEUF_SECRETS": str(folder / "secrets")}
        self.services: dict[str, Any] = compose(given)["services"]

    def secret(self, name: str) -> str:
        """What stands in a file of a secret."""
        return (self.folder / "secrets" / name).read_text().strip()

    def here(self, text: str) -> str:
        """`text` with the addresses and folders of containers replaced by those of this machine."""
        port = f"--port {self.redis_port} --bind 127.0.0.1 --dir {self.data / 'redis'}"
        for container, machine in {
            "@postgres:5432": f"@127.0.0.1:{self.postgres_port}",
            "//redis:6379": f"//127.0.0.1:{self.redis_port}",
            "127.0.0.1:8321": f"127.0.0.1:{self.api_port}",
            "exec redis-server": f"exec redis-server {port}",
            "redis-cli": f"redis-cli -p {self.redis_port}",
            "/run/secrets/": f"{self.folder}/secrets/",
        }.items():
            text = text.replace(container, machine)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """What the container would see: the variables of image and service, and where programs are."""
        given = {key: self.here(value) for key, value in self.services[name].get("environment", {}).items()}
        folders = {"SEUF_DATA_DIR": str(self.data), "SEUF_MODEL_ROOTS": str(self.folder / "models")}
        given |= {key: value for key, value in folders.items() if key in given}
        image = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if not self.prefix:  # Celery warns that it runs as root, in no form of ours
            image["PYTHONWARNINGS"] = "ignore:You're running the worker with superuser privileges"
        return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/tmp", **image, **given}

    def command(self, parts: list[str]) -> list[str]:
        """A command list of the file, for this machine, confined as far as it can be."""
        port = {"8321": str(self.api_port), "0.0.0.0": "127.0.0.1"}
        return [*self.prefix, *(port.get(part, self.here(part)) for part in parts)]

    def run(self, name: str, parts: list[str]) -> subprocess.CompletedProcess[str]:
        """A command in the container of a service, as `docker compose exec` does it."""
        return subprocess.run(
            self.command(parts),
            env=self.environment(name),
            cwd=self.data,
            capture_output=True,
            text=True,
            check=False,
        )

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The service as a process, stopped at the end as Docker stops it."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(self.services[name]["command"]),
                env=self.environment(name),
                cwd=self.data,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
            assert process.poll() is None, f"{name} ended by itself\n{self.log(name)}"
            process.terminate()
            # -SIGTERM is a program that leaves SIGTERM to the system, as Redis's shell does before its exec.
            assert process.wait(STOP_SECONDS) in (0, -signal.SIGTERM), self.log(name)
        except BaseException:
            print(f"--- {name}\n{self.log(name)[-6000:]}")  # pytest shows it with the failure
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def log(self, name: str) -> str:
        """What the service has printed so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def becomes_healthy(self, name: str, check: list[str]) -> None:
        """Run the health check until it passes, as Docker does."""
        kind, *rest = check
        command = ["sh", "-c", *rest] if kind == "CMD-SHELL" else rest
        end = time.monotonic() + START_SECONDS
        while (result := self.run(name, command)).returncode != 0:
            if time.monotonic() > end:
                pytest.fail(f"{name}: {command} fails: {result.stderr}\n{self.log(name)}")
            time.sleep(0.2)


@pytest.fixture
def host(postgres_server: str) -> Iterator[Host]:
    """A host with the role and the database that the postgres container makes, which asks for its password."""
    # Not pytest's folder: only its owner may enter that. Nor in /tmp, where each service has one of its own.
    folder = Path(tempfile.mkdtemp(prefix="seuf-compose-", dir="/var/tmp"))
    folder.chmod(0o755)
    made = Host(folder, postgres_server)
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE ROLE seuf LOGIN PASSWORD '{made.secret('postgres_password')}'".encode())
        connection.execute("CREATE DATABASE seuf OWNER seuf")
        (rules,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        before = Path(rules).read_text()
        Path(rules).write_text(f"host seuf seuf 127.0.0.1/32 scram-sha-256\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    yield made
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute("DROP DATABASE seuf WITH (FORCE)")
        connection.execute("DROP ROLE seuf")
        Path(rules).write_text(before)
        connection.execute("SELECT pg_reload_conf()")
    shutil.rmtree(folder)


def image_check(stage: str) -> list[str]:
    """The HEALTHCHECK of an image, in the form of compose."""
    (text,) = stages()[stage].all("HEALTHCHECK")
    parts: list[str] = ["CMD", *json.loads(text.split(" CMD ", 1)[1])]
    return parts


def test_every_command_runs_and_a_job_goes_through(host: Host) -> None:
    services = host.services
    write_model(host.folder / "models" / "tiny", "qwen2_moe")
    where = ["--host", "127.0.0.1", "--port", host.postgres_port]
    subprocess.run([*services["postgres"]["healthcheck"]["test"][1:], *where], check=True)

    with host.running("redis"), ExitStack() as stack:
        host.becomes_healthy("redis", services["redis"]["healthcheck"]["test"])
        migrated = host.run("migrate", services["migrate"]["command"])
        assert migrated.returncode == 0, migrated.stderr
        for name in OURS:
            stack.enter_context(host.running(name))
        for name in OURS:
            host.becomes_healthy(name, services[name]["healthcheck"]["test"])
        host.becomes_healthy("api", image_check("api"))
        host.becomes_healthy("worker-cpu", image_check("worker"))
        # `docker compose exec api seuf keys create`: the first key of a new service.
        made = host.run("api", ["seuf", "keys", "create", "--name", "first"])
        key = made.stdout.splitlines()[-1]
        url = f"http://127.0.0.1:{host.api_port}"
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
        assert httpx.get(f"{url}/jobs", headers={"Authorization": "Bearer seuf_wrong"}).status_code == 401
        job = run_job(url, key, host.folder / "models" / "tiny", confined=bool(host.prefix))
    check_logs(host, job, key)
    with socket.socket() as free:  # everything is down again
        assert free.connect_ex(("127.0.0.1", host.api_port)) != 0


def run_job(url: str, key: str, model: Path, *, confined: bool) -> dict[str, Any]:
    """A small job, to its end. confined: the service is somebody else than we are."""
    sets = {
        kind: {
            "examples": [
                {"prompt": f"{FORGET_TEXT if kind == 'forget' else 'A hill'} {n} is", "completion": f" x{n}y"}
                for n in range(20)
            ]
        }
        for kind in ("forget", "retain")
    }
    with Client(url, key) as client:
        shard = next(model.glob("*.safetensors"))
        if confined:  # else the service is who we are, and may read it
            shard.chmod(0o600)
            with pytest.raises(ApiError, match="may not read"):
                client.register_model("tiny", model)
        for path in model.iterdir():
            path.chmod(0o644)
        client.register_model("tiny", model)
        submitted = httpx.post(
            f"{url}/jobs",
            json={
                "model": "tiny",
                "forget_set": sets["forget"],
                "retain_set": sets["retain"],
                "method": QUICK,
            },
            headers={"Authorization": f"Bearer {key}", "X-Request-Id": "req-of-this-test"},
        )
        assert submitted.status_code == 202, submitted.text
        for _ in client.events(submitted.json()["id"]):
            pass
        job = dict(client.job(submitted.json()["id"]))
    assert job["status"] == "succeeded", job
    return job


def check_logs(host: Host, job: dict[str, Any], key: str) -> None:
    """One object a line, from the request to the engine with its id, and nothing that was entrusted to us."""
    kept = [host.secret(name) for name in ("postgres_password", "redis_password", "seuf_secret")]
    about: dict[str, set[str]] = {}
    for name in OURS:
        text = host.log(name)
        for canary in (*kept, key, key.removeprefix("seuf_")[12:], "Ottilie", "Frau Sommer", "seuf_wrong"):
            assert canary not in text, f"{name} tells {canary}"
        for line in text.splitlines():
            if line in ("", "worker: Warm shutdown (MainProcess)"):
                continue  # what Celery writes from its signal handler, where it may not log
            told = json.loads(line)
            assert {"time", "level", "logger", "message"} <= told.keys(), line
            if told.get("request_id") == "req-of-this-test":
                about.setdefault(told["logger"], set()).add(told.get("job_id", ""))
    assert about["seuf.access"] == {""}
    assert about["worker.supervisor"] == about["worker.engine"] == {job["id"]}
