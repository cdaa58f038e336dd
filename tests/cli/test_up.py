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


def test_the_key_is_shown_once_and_no_worker_outlives_a_killed_service(shell):
    first = shell.start("--no-worker", "--json")
    shown = json.loads(first.stdout.readline())
    _check_that_it_answers(shell, shown)
    stop(first)
    assert first.returncode == 0
    second = shell.start("--json")
    again = json.loads(second.stdout.readline())
    assert _check_that_it_answers(shell, again) == shown["key"]
    assert again["key"] is None
    (worker,) = wait_for(lambda: workers_of(second.pid))
    second.kill()
    second.communicate()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    for name in ("key", "secret"):
        assert stat.S_IMODE((shell.home / "data" / name).stat().st_mode) == 0o600


def _check_that_it_answers(shell, ready):
    """The saved key opens the announced address; returns the key."""
    saved = json.loads((shell.home / "config" / "seuf" / "config.json").read_text())
    assert saved["url"] == ready["url"]
    headers = {"Authorization": f"Bearer {saved['key']}"}
    assert httpx.get(f"{ready['url']}/jobs", headers=headers).status_code == 200
    assert httpx.get(ready["docs"]).status_code == 200
    return saved["key"]


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


def test_from_submit_to_a_model_that_opens_though_the_first_worker_falls(shell, tiny_model):
    write_sets(shell.home)
    (shell.home / "tiny").symlink_to(tiny_model)
    service = shell.start("--json")
    json.loads(service.stdout.readline())
    (fallen,) = wait_for(lambda: workers_of(service.pid))
    os.kill(fallen, 9)
    (worker,) = wait_for(lambda: [pid for pid in workers_of(service.pid) if pid != fallen])
    done = shell.run(*SUBMIT, "--steps", 2, "--set", "evaluate_every=1", "--metadata", "ticket=7", "--watch")
    assert done.returncode == 0, done.stderr
    for word in ("queued", "attributing", "unlearning", "publishing", "succeeded", "selected: layer"):
        assert word in done.stderr
    assert re.search(r"set +domain +figure +before +.*after", done.stdout)
    job = re.search(r"job_[a-z2-7]{20}", done.stderr)[0]
    shown = shell.run("get", job, "--heatmap", "map.svg").stdout
    assert (shell.home / "map.svg").read_text().startswith("<svg")
    assert "succeeded" in shown
    assert "ticket=7" in shown
    assert re.search(r"^experts +layer \d expert \d", shown, re.MULTILINE)
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
    said = stop(service)
    assert "starting it again" in said
    assert "Stopping" in said
    assert service.returncode == 0
    assert not Path(f"/proc/{worker}").exists()


def wait_for(look, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")
