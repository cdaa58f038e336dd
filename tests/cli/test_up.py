"""`seuf up`: its key, its host, its port, its end."""

import json
import os
import re
import socket
import stat
import time
from pathlib import Path

import httpx
import pytest

from tests.shell import stop, workers_of, write_sets

SUBMIT = ("submit", "--model", "tiny", "--forget", "forget.jsonl", "--retain", "retain.jsonl")


def test_the_key_is_shown_once_and_survives_a_restart(shell):
    keys = []
    for _ in range(2):
        process = shell.start("--no-worker", "--json")
        ready = json.loads(process.stdout.readline())
        saved = json.loads((shell.home / "config" / "seuf" / "config.json").read_text())
        keys.append((ready["key"], saved["key"]))
        headers = {"Authorization": f"Bearer {saved['key']}"}
        assert httpx.get(f"{ready['url']}/jobs", headers=headers).status_code == 200
        assert httpx.get(ready["docs"]).status_code == 200
        stop(process)
        assert process.returncode == 0
    (first_shown, first), (second_shown, second) = keys
    assert first_shown == first == second
    assert second_shown is None
    for name in ("key", "secret"):
        assert stat.S_IMODE((shell.home / "data" / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org"])
def test_only_loopback_unless_allowed(shell, host):
    done = shell.run("up", "--data-dir", "data", "--host", host)
    assert done.returncode == 1
    assert "--allow-remote" in done.stderr
    assert not (shell.home / "data").exists()


def test_a_port_that_is_taken(shell):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = shell.run("up", "--data-dir", "data", "--port", other.getsockname()[1])
    assert done.returncode == 1
    assert "--port" in done.stderr


def test_a_cluster_setting_is_not_ignored(shell):
    done = shell.run("up", "--data-dir", "data", SEUF_BROKER_URL="redis://127.0.0.1:1")
    assert done.returncode == 1
    assert "docker compose" in done.stderr


def test_from_submit_to_a_model_that_opens(shell, tiny_model):
    write_sets(shell.home)
    (shell.home / "tiny").symlink_to(tiny_model)
    service = shell.start("--json")
    json.loads(service.stdout.readline())
    (worker,) = wait_for(lambda: workers_of(service.pid))
    done = shell.run(*SUBMIT, "--steps", 2, "--set", "evaluate_every=1", "--metadata", "ticket=7", "--watch")
    assert done.returncode == 0, done.stderr
    for word in ("queued", "attributing", "unlearning", "publishing", "succeeded", "selected: layer"):
        assert word in done.stderr
    assert re.search(r"set +domain +figure +before +.*after", done.stdout)
    job = re.search(r"job_[a-z2-7]{20}", done.stderr)[0]
    shown = shell.run("get", job).stdout
    assert "succeeded" in shown
    assert "ticket=7" in shown
    listed = shell.run("list", "--status", "succeeded").stdout
    assert job in listed
    assert "tiny" in listed
    downloaded = shell.run("download", job, "--out", "unlearned")
    assert downloaded.returncode == 0, downloaded.stderr
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(shell.home / "unlearned")
    assert json.loads((shell.home / "unlearned" / "manifest.json").read_text())["parameters_changed"] > 0
    again = shell.run("download", job, "--out", "unlearned")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("error: ")
    assert "exists already" in again.stderr
    assert "Stopping" in stop(service)
    assert service.returncode == 0
    assert not Path(f"/proc/{worker}").exists()


def test_a_fallen_worker_is_started_again_and_none_outlives_a_killed_service(shell):
    service = shell.start("--json")
    json.loads(service.stdout.readline())
    (first,) = wait_for(lambda: workers_of(service.pid))
    os.kill(first, 9)
    (second,) = wait_for(lambda: [pid for pid in workers_of(service.pid) if pid != first])
    service.kill()
    assert "starting it again" in service.communicate()[1]
    wait_for(lambda: not Path(f"/proc/{second}").exists())


def wait_for(look, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")
