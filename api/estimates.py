"""POST /jobs/estimate: the plan of a job that is not submitted."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api import schemas
from api.context import Service, TheCaller, TheService, needs
from api.docs import problems
from api.jobs import SETS, check_retain, checked_inline, known_model, uploaded
from api.problems import at, from_seuf_error
from seuf_core.data.records import Purpose
from seuf_core.errors import SeufError
from seuf_core.plan.estimate import estimate
from seuf_core.plan.facts import Calibration, Machine
from store.events import Events
from store.files import artefact_key
from store.tables import Model

router = APIRouter(prefix="/jobs", tags=["jobs"])

_UNCALIBRATED: Final = "No finished job has measured a worker yet."
_GIGABYTE: Final = 2_000_000_000


class PlannedPhase(BaseModel):
    """One phase of a job as planned; sizes in bytes."""

    name: str = Field(examples=["attributing"])
    bytes_read: int = Field(examples=[13_838_323_712])
    bytes_written: int
    flops: int = Field(description="Floating-point operations.")
    seconds: float | None = Field(examples=[81.5])
    memory: dict[str, int] = Field(
        description="What is in memory at its peak, by what it is for.",
        examples=[{"process": 350_000_000, "layers": 1_677_721_600}],
    )
    peak_bytes: int = Field(examples=[_GIGABYTE])


class Estimate(BaseModel):
    """What a job would read, hold, compute and write; sizes in bytes. Nothing was created."""

    object: Literal["estimate"] = "estimate"
    device: str = Field(examples=["cpu"])
    device_why: str
    residency: str = Field(
        description="whole = all layers stay in memory; suffix = those from the lowest target layer on; "
        "streamed = the target layers only.",
        examples=["suffix"],
    )
    residency_why: str
    fits: bool = Field(description="Whether the peak is within `budget_bytes`.")
    budget_bytes: int
    budget_why: str
    peak_bytes: int = Field(examples=[_GIGABYTE])
    host_bytes: int
    device_bytes: int
    bytes_read: int
    bytes_written: int
    micro_batch_tokens: int = Field(description="Padded tokens that go through at once while training.")
    lowest_layer: int | None = Field(description="Of the targets; null where no expert is chosen.")
    bound: bool = Field(description="Whether the targets are the worst case, as they are not known yet.")
    experts: int
    phases: list[PlannedPhase]
    runs: int = Field(description="Learning rates that may be tried on one selection of experts.")
    seconds: float | None = Field(description="Of one run; null where no worker is known.")
    seconds_all: float | None = Field(description="Of every rate on one selection.")
    seconds_missing: str | None = Field(description="Why there are no seconds.", examples=[_UNCALIBRATED])
    tokens_counted: str = Field(description="tokenizer, or bytes: a quarter of the texts' bytes.")
    calibration: dict[str, Any] | None = Field(description="What a worker measured of itself.")
    notes: list[str]


@router.post("/estimate", dependencies=[needs("jobs:write")], responses=problems(400, 413, 422))
def estimate_job(body: schemas.JobCreate, service: TheService, caller: TheCaller) -> Estimate:
    """What this job would read, hold in memory, compute, write and take. Creates nothing.

    The body is that of POST /jobs. Seconds and memory are those of the worker that ran the newest finished job, on
    this model if there is one; before any has, `seconds` is null and the memory is that of this machine.
    """
    check_retain(body)
    inline = checked_inline(body)
    with service.database.read() as session:
        model = known_model(body, session, caller.tenant)
        stored = {
            purpose: found.file
            for purpose in SETS
            if (found := uploaded(body, purpose, session, caller.tenant)) is not None
        }
        events = Events(session, caller.tenant)
        newest = events.newest_of_finished("plan", model.id) or events.newest_of_finished("plan")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seuf-estimate-")))
        sets = {purpose: _fetched(service, purpose, file, scratch) for purpose, file in stored.items()}
        for purpose, (_, content) in inline.items():
            sets[purpose] = scratch / f"{purpose}.jsonl"
            sets[purpose].write_bytes(content)
        return _planned(body, model, sets, newest.data.get("plan") if newest else None)


def _fetched(service: Service, purpose: Purpose, file_id: str, scratch: Path) -> Path:
    """An uploaded set as a local file."""
    path = scratch / f"{purpose}.jsonl"
    try:
        service.artefacts.fetch(artefact_key(file_id), path)
    except FileNotFoundError as error:
        message = f"The bytes of {file_id} are gone: it was deleted."
        raise at(f"/{purpose}_set/file", 422, "file_gone", message, "Upload the file again.") from error
    return path


def _planned(
    body: schemas.JobCreate, model: Model, sets: dict[Purpose, Path], known: dict[str, Any] | None
) -> Estimate:
    """The plan, on the worker that `known`, the recorded plan of a finished job, was made for."""
    calibration = (known or {}).get("calibration")
    on = None
    if known is not None:
        device, free = known["device"], known["budget_bytes"]
        devices = {} if device == "cpu" else {device: free}
        on = Machine(free, "what the worker of a finished job had", devices)
    try:
        plan = estimate(
            Path(model.path),
            sets["forget"],
            retain=sets.get("retain"),
            evaluation=sets.get("evaluation"),
            method=body.method,
            on=on,
            calibration=Calibration.from_dict(calibration) if calibration else None,
            missing=_UNCALIBRATED,
        )
    except SeufError as error:
        raise from_seuf_error(error, error.pointer or "/model") from error
    return Estimate.model_validate(plan.as_dict())
