"""Small real functions with the signature of seuf_core.unlearn, for tests of the machinery around the
method.

SEUF_ENGINE_ENTRY points the engine process at one of them. Each does what a method may do to a worker:
finish, take long, ignore a stop, refuse its input, crash, run out of memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sqlalchemy import update

from seuf_core.checkpoint.manifest import MANIFEST, BaseRef, FileEntry, Manifest, sha256_file
from seuf_core.errors import Cancelled, DataError
from seuf_core.method import Method
from seuf_core.observer import Observer
from store.database import Database
from store.settings import Settings
from store.tables import Job

if TYPE_CHECKING:
    from seuf_core.checkpoint.copying import Share

STEP = "rung-0.safetensors"
"""The training checkpoint of the entries that count steps: the number, under the name that such files have."""
EXPERTS = [{"layer": 1, "expert": 2, "score": 0.9}]
ATTRIBUTION = {
    "score": "contrast",
    "matrix": [[0.1, 0.9], [0.5, float("nan")]],
    "layers": [0, 1],
    "stability": {"runs": 2},
    "coverage": 0.8,
}
METRICS = [
    {
        "stage": "before",
        "set": "forget",
        "domain": None,
        "name": "choice",
        "value": 0.75,
        "n": 4,
        "chance": 0.25,
    },
    {
        "stage": "after",
        "set": "forget",
        "domain": None,
        "name": "choice",
        "value": 0.25,
        "n": 4,
        "chance": 0.25,
    },
]


def works(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Every kind of event, `method.steps` quick steps, a checkpoint of one file."""
    observer.phase("validating", 1, 1)
    given = {"model": str(model), "forget": forget.read_text(), "steps": method.steps, "seed": method.seed}
    observer.phase("attributing", 1, 1)
    observer.event("attribution", ATTRIBUTION)
    observer.event("selection", {"experts": EXPERTS, "coverage": 0.8})
    work.mkdir(parents=True, exist_ok=True)
    for step in range(1, method.steps + 1):
        observer.phase("unlearning", step, method.steps)
        observer.event("step", {"step": step, "loss": 1 / step})
        time.sleep(0.005)
    observer.event("rung", {"rung": 0})
    observer.phase("evaluating", 2, 2)
    out.mkdir()
    (out / "given.json").write_text(json.dumps(given))
    size, sha256 = (out / "given.json").stat().st_size, sha256_file(out / "given.json")
    manifest = Manifest(
        created_by="test",
        base=BaseRef(digest="sha256:0", model_type="qwen2_moe"),
        files=(FileEntry(name="given.json", bytes=size, sha256=sha256),),
        changed=(),
        parameters_changed=1,
        parameters_total=2,
    )
    (out / MANIFEST).write_text(manifest.to_json())
    return SimpleNamespace(attribution=ATTRIBUTION, selection=EXPERTS, metrics=METRICS, manifest=manifest)


def runs_until_stopped(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Steps of 20 ms; counts them in `work`, and says in an event where it went on from."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / STEP
    step = int(saved.read_text()) if saved.exists() else 0
    observer.event("pid", {"pid": os.getpid(), "resumed_at": step})
    while True:
        step += 1
        observer.phase("unlearning", step, 1_000_000)
        observer.event("step", {"step": step, "loss": 0.5})
        time.sleep(0.02)
        if observer.cancelled():
            saved.write_text(str(step))
            raise Cancelled


def saves_each_step(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Steps of 20 ms, each with a training checkpoint, until it is stopped or killed."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / STEP
    step = int(saved.read_text()) if saved.exists() else 0
    observer.event("pid", {"pid": os.getpid(), "resumed_at": step})
    while True:
        step += 1
        draft = work / "draft.partial"
        draft.write_text(str(step))
        draft.replace(saved)
        observer.event("step", {"step": step, "loss": 0.5})
        time.sleep(0.02)
        if observer.cancelled():
            raise Cancelled


def grows(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Ten megabytes more every 50 ms, in a child of its own too."""
    program = "import time; held = []\nwhile True: held.append(b'x' * (5 << 20)); time.sleep(0.05)"
    subprocess.Popen([sys.executable, "-c", program])
    observer.event("pid", {"pid": os.getpid(), "memory": memory})
    held = []
    while True:
        held.append(b"x" * (5 << 20))
        time.sleep(0.05)


def exits(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """An end that leaves nothing to read."""
    os._exit(7)


def fills_the_disk(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """What a full disk answers."""
    with Path("/dev/full").open("w") as full:
        full.write("x")


def fills_the_disk_with_weights(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """What safetensors (0.8) says of a full disk, word for word.

    (Saved to /dev/full it would put a file in the place of the device.)
    """
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def evaluates_until_stopped(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """A phase that never asks whether it is cancelled."""
    observer.event("pid", {"pid": os.getpid()})
    while True:
        observer.phase("evaluating", 0, 4)
        time.sleep(0.02)


def ignores_stop(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Sleeps through everything, with a child of its own in its process group."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    observer.event("pid", {"pid": os.getpid(), "child": child.pid})
    while True:
        time.sleep(600)


def refuses(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """The input cannot be used."""
    raise DataError(
        "no_forget_probes", "The evaluation set has no forget probe.", "Add one.", "/evaluation_set"
    )


def crashes(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """An error nobody foresaw, quoting the data."""
    raise ValueError(forget.read_text())


def needs_memory(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """More bytes than any machine has."""
    return bytearray(1 << 60)


def is_killed(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """What the kernel does when memory runs out."""
    out.mkdir()
    (out / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def aborts(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """A crash below Python."""
    os.abort()


def loses_its_lease(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """Finishes, but another worker has the job by then."""
    result = works(
        model,
        forget,
        out,
        retain=retain,
        evaluation=evaluation,
        method=method,
        work=work,
        observer=observer,
        memory=memory,
        share=share,
    )
    with Database(Settings().database_url).write() as session:
        session.execute(update(Job).values(lease_token=Job.lease_token + 1, lease_worker="worker-2"))
    return result


PAUSE_STEP = 25


class PausesOnce:
    """Passes everything on; the first attempt of a house sleeps after step PAUSE_STEP, to be killed."""

    def __init__(self, observer: Observer, mark: Path) -> None:
        self.observer, self.mark = observer, mark

    def phase(self, name: str, done: int, total: int) -> None:
        self.observer.phase(name, done, total)

    def event(self, type: str, data: dict[str, Any]) -> None:  # noqa: A002
        self.observer.event(type, data)
        if type == "step" and data["step"] == PAUSE_STEP and not self.mark.exists():
            self.mark.touch()
            time.sleep(600)

    def cancelled(self) -> bool:
        return self.observer.cancelled()


def unlearns_with_a_pause(
    model: Path,
    forget: Path,
    out: Path,
    *,
    retain: Path | None,
    evaluation: Path | None,
    method: Method,
    work: Path,
    observer: Observer,
    memory: int | None,
    share: Share,
) -> Any:
    """The real method."""
    from seuf_core import unlearn  # loads torch, which the other functions do without

    pausing = PausesOnce(observer, work.parents[3] / "paused")
    return unlearn(
        model,
        forget,
        out,
        retain=retain,
        evaluation=evaluation,
        method=method,
        work=work,
        observer=pausing,
        memory=memory,
        share=share,
    )
