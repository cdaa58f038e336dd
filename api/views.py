"""Rows of the store as answers. The only place that knows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from api import schemas
from store import repository, tables

Row = TypeVar("Row", bound=tables.Tenanted)
T = TypeVar("T")


def page(rows: repository.Page[Row], view: Callable[[Row], T]) -> schemas.Page[T]:
    """A page of rows as a page of answers."""
    return schemas.Page(data=[view(row) for row in rows.data], has_more=rows.has_more, next=rows.next)


def file(row: tables.File) -> schemas.File:
    """An uploaded set."""
    return schemas.File(
        id=row.id,
        purpose=row.purpose,
        filename=row.name,
        format=row.format,
        bytes=row.uploaded_bytes,
        sha256=row.uploaded_sha256,
        stored_bytes=row.bytes,
        stored_sha256=row.sha256,
        examples=row.examples,
        tokens_estimate=row.tokens_estimate,
        created_at=row.created_at,
    )


def upload(row: tables.Upload, parts: Sequence[tables.UploadPart], part_bytes: int) -> schemas.Upload:
    """An upload in parts, as it stands."""
    return schemas.Upload(
        id=row.id,
        purpose=row.purpose,
        filename=row.name,
        format=row.format,
        bytes=row.bytes,
        sha256=row.sha256,
        part_bytes=part_bytes,
        parts=[part(one) for one in parts],
        received_bytes=sum(one.bytes for one in parts),
        file=row.file_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def part(row: tables.UploadPart) -> schemas.Part:
    """A part that is there."""
    return schemas.Part(number=row.number, bytes=row.bytes, sha256=row.sha256)


def model(row: tables.Model) -> schemas.Model:
    """A registered model; its facts are stored as inspected."""
    facts = {name: row.facts[name] for name in MODEL_FACTS}
    return schemas.Model(
        id=row.id, name=row.name, path=row.path, digest=row.digest, created_at=row.created_at, **facts
    )


MODEL_FACTS = (
    "model_type",
    "num_layers",
    "moe_layers",
    "num_experts",
    "num_experts_per_tok",
    "parameters",
    "bytes",
    "dtype",
)


def job(row: tables.Job) -> schemas.Job:
    """A job as it stands."""
    here = f"/jobs/{row.id}"
    error = None
    if row.error_code is not None:
        error = schemas.JobError(code=row.error_code, message=row.error_message or "", fix=row.error_fix)
    return schemas.Job(
        id=row.id,
        status=row.status.value,
        phase=row.phase,
        progress=schemas.Progress(
            phase=row.phase,
            done=row.phase_done,
            total=row.phase_total,
            step=row.step,
            loss=row.loss,
            seconds_left=row.seconds_left,
        ),
        model=row.model_id,
        forget_set=row.forget_file,
        retain_set=row.retain_file,
        evaluation_set=row.evaluation_file,
        method=row.method,
        seed=row.seed,
        limits=schemas.JobLimits.model_construct(
            max_seconds=row.max_seconds, max_memory_bytes=row.max_memory_bytes
        ),
        metadata=row.meta,
        retry_of=row.retry_of,
        cancel_requested=row.cancel_requested,
        attempts=row.attempts,
        error=error,
        checkpoint=row.checkpoint_id,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        links=schemas.JobLinks(
            self=here,
            events=f"{here}/events",
            attribution=f"{here}/attribution",
            heatmap=f"{here}/attribution.svg",
            metrics=f"{here}/metrics",
            checkpoint=f"/checkpoints/{row.checkpoint_id}" if row.checkpoint_id else None,
        ),
    )


def event(row: tables.Event) -> schemas.Event:
    """One event of a job."""
    return schemas.Event(seq=row.seq, type=row.type, data=row.data, created_at=row.at)


def attribution(row: tables.Attribution, selection: list[tables.SelectedExpert]) -> schemas.Attribution:
    """The score of every expert, and the experts that were chosen."""
    return schemas.Attribution(
        job=row.job_id,
        score=row.score,
        matrix=row.matrix,
        layers=row.layers,
        stability=row.stability,
        coverage=row.coverage,
        selection=[schemas.SelectedExpert.model_validate(expert) for expert in selection],
    )


def metric(row: tables.Metric) -> schemas.Metric:
    """One measured figure."""
    return schemas.Metric.model_validate(row)


def model_facts(facts: Any) -> dict[str, Any]:
    """What is stored of `ModelFacts`, as JSON."""
    return {
        name: list(value) if isinstance(value := getattr(facts, name), tuple) else value
        for name in MODEL_FACTS
    }
