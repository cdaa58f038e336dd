"""(e) A whole job, from upload to success, beside `seuf run` on the same files; and from claim to first step.

`seuf run` starts Python and loads the library each time; the service has an engine ready. Both train the reference
model with the default method and the same seed, in turn, and must come to the same weights.

Figures: whole/<service|run>/seconds, whole/overhead in seconds and whole/overhead_share (goal: at most 2 s + 5 %), and
whole/claim_to_<phase|step> in seconds: from the claim to the method's first sign of life, and to its first step.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, stage

REPEATS = 3


@dataclass(frozen=True)
class Files:
    """What is unlearned, and how."""

    model: Path
    forget: Path
    retain: Path
    evaluation: Path | None
    method: dict[str, Any]


def run(options: Options, figures: Figures, folder: Path) -> None:
    """The service on SQLite with one worker, as `seuf up` runs it."""
    with stage(folder / "whole", "sqlite") as service:
        files = _reference() if options.whole else _tiny(service)
        service.start("worker", ["worker", "--lane", "database"])
        with service.client() as client:
            model = client.register_model("base", files.model)["id"]
        ours, theirs, phases, steps = [], [], [], []
        for number in range(min(options.repeats, REPEATS)):
            seconds, job = _by_service(service, files, model)
            ours.append(seconds)
            phases.append(_claim_to(service, job["id"], "phase"))
            steps.append(_claim_to(service, job["id"], "step"))
            out = service.folder / f"out-{number}"
            theirs.append(_by_run(service, files, out))
            _check_same(service, job, out)
            shutil.rmtree(out)
        service_seconds, run_seconds = median(ours), median(theirs)
        figures.add("whole/service/seconds", service_seconds, "s")
        figures.add("whole/run/seconds", run_seconds, "s")
        figures.add("whole/overhead", service_seconds - run_seconds, "s")
        figures.add("whole/overhead_share", service_seconds / run_seconds - 1, "share")
        figures.add("whole/claim_to_phase", median(phases), "s")
        figures.add("whole/claim_to_step", median(steps), "s")


def _reference() -> Files:
    from seuf_core import reference  # loads torch

    built = reference.build()
    return Files(built.model, built.forget, built.retain, built.probes, {})


def _tiny(service: Stage) -> Files:
    prepare(service)
    method = {"attribution": "affinity", "experts": 1, "strength": "fixed", "learning_rate": 1e-4, "steps": 2}
    sets = (service.folder / f"{purpose}.jsonl" for purpose in ("forget", "retain"))
    return Files(service.folder / "model", *sets, None, method)


def _by_service(service: Stage, files: Files, model: str) -> tuple[float, dict[str, Any]]:
    with service.client() as client:
        began = time.monotonic()
        sets = {"forget": files.forget, "retain": files.retain, "evaluation": files.evaluation}
        ids = {purpose: client.upload(path, purpose)["id"] for purpose, path in sets.items() if path}  # type: ignore[arg-type]
        job = client.submit(
            model,
            ids["forget"],
            retain_set=ids["retain"],
            evaluation_set=ids.get("evaluation"),
            method=files.method,
        )
        for _ in client.events(job["id"]):
            pass
        seconds = time.monotonic() - began
        ended = dict(client.job(job["id"]))
    assert ended["status"] == "succeeded", ended["error"]
    return seconds, ended


def _by_run(service: Stage, files: Files, out: Path) -> float:
    options = {"model": files.model, "forget": files.forget, "retain": files.retain, "out": out}
    options |= {"evaluation": files.evaluation} if files.evaluation else {}
    options |= {name.replace("_", "-"): value for name, value in files.method.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    began = time.monotonic()
    command = [sys.executable, "-m", "cli.main", "run", *words]
    done = subprocess.run(command, env=service.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


def _claim_to(service: Stage, job_id: str, kind: str) -> float:
    """Seconds from a job's claim to its first event of a kind."""
    with service.client() as client:
        events = list(client.events(job_id))
    claimed = next(e for e in events if e["type"] == "status" and e["data"]["status"] == "running")
    first = next(event for event in events if event["type"] == kind)
    at = [datetime.fromisoformat(str(event["created_at"])) for event in (claimed, first)]
    return (at[1] - at[0]).total_seconds()


def _check_same(service: Stage, job: dict[str, Any], out: Path) -> None:
    """Both wrote the same bytes into the same files."""
    with service.client() as client:
        theirs = {file["name"]: file["sha256"] for file in client.checkpoint(job["checkpoint"])["files"]}
    manifest = json.loads((out / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["name"].endswith(".safetensors"):
            assert theirs[file["name"]] == file["sha256"], f"{file['name']} differs"
