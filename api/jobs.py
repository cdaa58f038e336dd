"""Jobs: submit, look, list, cancel, and what a job found and measured."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from pydantic import JsonValue
from sqlalchemy.orm import Session

from api import schemas, views
from api.context import Caller, Service, TheCaller, TheService, audit, needs
from api.docs import problems
from api.idempotency import TheOnce
from api.problems import FieldError, Problem, at, from_seuf_error
from api.sets import placed, record, refusal
from seuf_core.attribution.heatmap import attribution_svg
from seuf_core.data.formats import Format
from seuf_core.data.reader import FileSummary, SetReader
from seuf_core.data.records import Limits, Purpose
from seuf_core.errors import DataError, MethodError, ModelError
from seuf_core.families import require_experts
from seuf_core.version import __version__
from store.errors import FileDeletedError, NotFoundError
from store.files import Files
from store.jobs import Jobs, JobSpec, Moment, SetRef
from store.models import Models
from store.results import Results
from store.settings import Settings
from store.tables import Model
from store.tenants import Quota
from store.transitions import FINAL, Status
from telemetry import tracing

router = APIRouter(prefix="/jobs", tags=["jobs"])

INLINE_BYTES: Final = 1 << 20
POLL_SECONDS: Final = 2  # what Retry-After tells a poller; a step takes about as long
SETS: Final[tuple[Purpose, ...]] = ("forget", "retain", "evaluation")


@router.post(
    "",
    dependencies=[needs("jobs:write")],
    status_code=202,
    response_model=schemas.Job,
    responses=problems(400, 409, 413, 422),
)
def submit_job(body: schemas.JobCreate, service: TheService, caller: TheCaller, once: TheOnce) -> Response:
    """Start a job. Answers at once; poll `links.self` or follow `links.events`.

    The method is completed from its preset now and stored with the job: what this answer shows is what runs.
    GET /capabilities lists its choices; fields that do not go together are refused, each with its pointer.
    """
    check_retain(body)
    limits = _limits(body.limits, service.settings)
    inline = checked_inline(body)
    with placed(service) as placing:
        ids = {purpose: placing.put(io.BytesIO(content)) for purpose, (_, content) in inline.items()}
        with service.database.write() as session:
            Quota(session, caller.tenant).check(service.settings.limits(), jobs=1)
            sets = {purpose: SetRef(file_id, inline[purpose][0].sha256) for purpose, file_id in ids.items()}
            for purpose, file_id in ids.items():
                record(service, session, caller, file_id, inline[purpose][0], f"inline-{purpose}.jsonl")
            row = Jobs(session, caller.tenant).create(_spec(body, session, caller, sets, limits))
            audit(session, caller, "job.create", row.id)
            headers = {"Location": f"/jobs/{row.id}", "Retry-After": str(POLL_SECONDS)}
            return once.answer(session, 202, views.job(row), headers)


def _limits(asked: schemas.JobLimits, settings: Settings) -> schemas.JobLimits:
    """What the job may use: what it asks for, else what the service allows. 422 when it asks for more than that."""
    most_memory = settings.max_job_memory_bytes or None
    _refuse_above("max_seconds", asked.max_seconds, settings.max_job_seconds)
    _refuse_above("max_memory_bytes", asked.max_memory_bytes, most_memory)
    return schemas.JobLimits.model_construct(
        max_seconds=asked.max_seconds or settings.max_job_seconds,
        max_memory_bytes=asked.max_memory_bytes or most_memory,
    )


def _refuse_above(name: str, asked: float | None, most: float | None) -> None:
    if asked is not None and most is not None and asked > most:
        detail = f"This service allows a job {name} {most:.15g} at most; {asked:.15g} is asked for."
        raise at(f"/limits/{name}", 422, "limit_too_high", detail, "Ask for less, or ask the operator.")


def check_retain(body: schemas.JobCreate) -> None:
    """Refuse a job without the retain set that its method needs."""
    try:
        body.method.check_retain(given=body.retain_set is not None)
    except MethodError as error:
        raise from_seuf_error(error, "/retain_set") from error


def checked_inline(body: schemas.JobCreate) -> dict[Purpose, tuple[FileSummary, bytes]]:
    """The sets given inside the body, checked like an upload, as JSON Lines."""
    checked: dict[Purpose, tuple[FileSummary, bytes]] = {}
    for purpose in SETS:
        given: schemas.ExampleSet | None = getattr(body, f"{purpose}_set")
        if given is not None and given.examples is not None:
            checked[purpose] = _check_examples(purpose, given.examples)
        elif given is not None and given.content is not None:
            checked[purpose] = _check_content(purpose, given.content, given.format)
    return checked


def _check_examples(purpose: Purpose, examples: list[dict[str, JsonValue]]) -> tuple[FileSummary, bytes]:
    pointer = f"/{purpose}_set/examples"
    # surrogatepass: half a surrogate pair then fails the validator's UTF-8 check, with its place.
    lines = (json.dumps(example, ensure_ascii=False).encode("utf-8", "surrogatepass") for example in examples)
    content = b"".join(line + b"\n" for line in lines)
    summary, content = _check(purpose, content, "jsonl", pointer)
    if not summary.ok:
        errors = [
            FieldError(
                code=e.code, detail=e.message, pointer=f"{pointer}/{e.line - 1}" if e.line else pointer
            )
            for e in summary.errors
        ]
        detail = f"{errors[0].pointer}: {errors[0].detail}"
        raise Problem(422, "invalid_examples", detail, "Correct these examples.", errors=errors)
    return summary, content


def _check_content(purpose: Purpose, content: str, format: Format) -> tuple[FileSummary, bytes]:  # noqa: A002
    pointer = f"/{purpose}_set/content"
    summary, lines = _check(purpose, content.encode(), format, pointer)
    if not summary.ok:
        raise refusal(summary, pointer)
    return summary, lines


def _check(purpose: Purpose, content: bytes, format: Format, pointer: str) -> tuple[FileSummary, bytes]:  # noqa: A002
    """What a set inside the body holds, and its JSON Lines; 413 or 422 when that cannot be told."""
    fix = f'Upload the set with POST /files and give {{"file": id}} in {purpose}_set.'
    if len(content) > INLINE_BYTES:
        detail = f"A set inside a job is limited to {INLINE_BYTES} bytes; this one has {len(content)}."
        raise at(pointer, 413, "examples_too_large", detail, fix)
    lines = io.BytesIO()
    try:
        reader = SetReader(purpose, format, Limits(max_stored_bytes=2 * INLINE_BYTES), out=lines)
        reader.feed(content)
        return reader.finish(), lines.getvalue()
    except DataError as error:
        if error.code == "file_too_large":
            detail = f"A set inside a job may have {2 * INLINE_BYTES} bytes as JSON Lines; this one has more."
            raise at(pointer, 413, "examples_too_large", detail, fix) from None
        raise from_seuf_error(error, pointer) from None


def _spec(
    body: schemas.JobCreate,
    session: Session,
    caller: Caller,
    stored: dict[Purpose, SetRef],
    limits: schemas.JobLimits,
) -> JobSpec:
    """The job with every name looked up, or 422 with a pointer to the one that is not there."""
    tenant = caller.tenant
    sets = {
        purpose: stored.get(purpose) or uploaded(body, purpose, session, tenant, hold=True)
        for purpose in SETS
    }
    forget = sets["forget"]
    assert forget is not None  # required by the schema
    return JobSpec(
        model_id=known_model(body, session, tenant).id,
        forget=forget,
        retain=sets["retain"],
        evaluation=sets["evaluation"],
        method=body.method.model_dump(mode="json"),
        seed=body.method.seed,
        metadata=body.metadata,
        request_id=caller.request_id,
        traceparent=tracing.current(),
        max_seconds=limits.max_seconds,
        max_memory_bytes=limits.max_memory_bytes,
    )


def known_model(body: schemas.JobCreate, session: Session, tenant: str) -> Model:
    """The registered model of a job, or 422 when there is none or the scope cannot be had on it."""
    try:
        row = Models(session, tenant).get(body.model)
        if body.method.selects_experts:
            require_experts(row.facts["model_type"], row.facts["moe_layers"])
    except ModelError as error:
        raise from_seuf_error(error, "/method/scope") from error
    except NotFoundError as error:
        raise at(
            "/model",
            422,
            "unknown_model",
            error.message,
            "Register it with POST /models, or see GET /models.",
        ) from error
    return row


def uploaded(
    body: schemas.JobCreate, purpose: Purpose, session: Session, tenant: str, *, hold: bool = False
) -> SetRef | None:
    """An uploaded set of a job, or 422 when there is no such file or it is of another purpose.

    `hold`: nobody can delete it before the transaction ends.
    """
    given: schemas.ExampleSet | None = getattr(body, f"{purpose}_set")
    if given is None or given.file is None:
        return None
    pointer = f"/{purpose}_set/file"
    try:
        files = Files(session, tenant)
        row = files.held(given.file) if hold else files.get(given.file)
    except FileDeletedError as error:
        raise at(pointer, 422, "file_deleted", error.message, error.fix) from error
    except NotFoundError as error:
        raise at(
            pointer, 422, "unknown_file", error.message, "Upload it with POST /files, or see GET /files."
        ) from error
    if row.purpose != purpose:
        raise at(
            pointer,
            422,
            "wrong_purpose",
            f"{row.id} was uploaded as {row.purpose}, not as {purpose}.",
            f"Upload it again with purpose={purpose}, or name another file.",
        )
    return SetRef(row.id, row.sha256)


@router.get("", dependencies=[needs("jobs:read")], responses=problems(422))
def list_jobs(
    service: TheService, caller: TheCaller, query: Annotated[schemas.JobQuery, Query()]
) -> schemas.Page[schemas.Job]:
    """The jobs, newest first."""
    with service.database.read() as session:
        model_id = None
        if query.model is not None:
            try:
                model_id = Models(session, caller.tenant).get(query.model).id
            except NotFoundError:
                return schemas.Page(data=[], has_more=False, next=None)
        page = Jobs(session, caller.tenant).list(
            query.cursor,
            query.limit,
            [Status(status) for status in query.status],
            model_id,
            query.metadata,
            query.created_after,
            query.created_before,
        )
    return views.page(page, views.job)


@router.get(
    "/{job_id}",
    dependencies=[needs("jobs:read")],
    response_model=schemas.Job,
    responses={304: {"description": "Unchanged."}, **problems(404)},
)
def get_job(job_id: str, request: Request, service: TheService, caller: TheCaller) -> Response:
    """One job. To poll: send the ETag back as If-None-Match, and wait Retry-After seconds between looks."""
    asked = request.headers.get("if-none-match", "")
    with service.database.read() as session:
        jobs = Jobs(session, caller.tenant)
        # A poller mostly asks about what has not moved: five small columns, and no job is made of them.
        if asked and _seen(asked, _job_tag(moment := jobs.moment(job_id))):
            return Response(status_code=304, headers=_job_headers(moment))
        row = jobs.get(job_id)
    headers = _job_headers(Moment.of(row))
    return Response(views.job(row).model_dump_json(), media_type="application/json", headers=headers)


def _job_tag(moment: Moment) -> str:
    # Of the service's version too: another one may show more of the same job.
    return f'W/"{__version__}-{"-".join(map(str, moment))}"'


def _job_headers(moment: Moment) -> dict[str, str]:
    wait = {"Retry-After": str(POLL_SECONDS)} if moment.status not in FINAL else {}
    return {"ETag": _job_tag(moment), "Cache-Control": "private, no-cache", **wait}


def _seen(asked: str, etag: str) -> bool:
    return etag in (tag.strip() for tag in asked.split(","))


def _unless_seen(request: Request, content: bytes, media_type: str) -> Response:
    """The content with its ETag, or 304 for a caller who has it."""
    # Weak: it says that the same facts are shown, not how they are written.
    etag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if _seen(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@router.post(
    "/{job_id}/cancel", dependencies=[needs("jobs:write")], status_code=202, responses=problems(404, 409)
)
def cancel_job(job_id: str, service: TheService, caller: TheCaller) -> schemas.Job:
    """Cancel a job: a queued one at once, a running one becomes `cancelling` until its worker has stopped it.

    Asking twice is harmless; a job that has ended otherwise cannot be cancelled (409).
    """
    with service.database.write() as session:
        row = Jobs(session, caller.tenant).request_cancel(job_id)
        audit(session, caller, "job.cancel", job_id)
    return views.job(row)


@router.post(
    "/{job_id}/retry",
    dependencies=[needs("jobs:write")],
    status_code=202,
    response_model=schemas.Job,
    responses=problems(404, 409),
)
def retry_job(job_id: str, service: TheService, caller: TheCaller, once: TheOnce) -> Response:
    """Run a failed or cancelled job again, as a new job with the same model, sets, method and limits.

    It goes on from the last training checkpoint of the old one, if the machine that ran it still has it (an operator
    says for how many days), and else from the start. Either way it ends with the same weights, bit for bit, as one
    run without a break. Its limits count anew. 409 for a job in another state, and when one of its sets was deleted.
    """
    with service.database.write() as session:
        Quota(session, caller.tenant).check(service.settings.limits(), jobs=1)
        try:
            row = Jobs(session, caller.tenant).retry(job_id, caller.request_id, tracing.current())
        except FileDeletedError as error:
            fix = "Upload the set again and submit a new job."
            raise Problem(409, "file_deleted", error.message, fix) from error
        audit(session, caller, "job.retry", row.id)
        headers = {"Location": f"/jobs/{row.id}", "Retry-After": str(POLL_SECONDS)}
        return once.answer(session, 202, views.job(row), headers)


@router.get("/{job_id}/attribution", dependencies=[needs("jobs:read")], responses=problems(404))
def get_attribution(job_id: str, service: TheService, caller: TheCaller) -> schemas.Attribution:
    """Which expert serves the forget set: the score of each, and the ones the job trains."""
    return _attribution(job_id, service, caller.tenant)


@router.get(
    "/{job_id}/attribution.svg",
    dependencies=[needs("jobs:read")],
    response_class=Response,
    responses={
        200: {
            "content": {"image/svg+xml": {}},
            "description": "Layer x expert; the trained ones are framed.",
        },
        304: {"description": "Unchanged."},
        **problems(404),
    },
)
def draw_attribution(job_id: str, request: Request, service: TheService, caller: TheCaller) -> Response:
    """The same scores as a picture: a row a layer, a column an expert."""
    drawn = attribution_svg(_attribution(job_id, service, caller.tenant).model_dump())
    return _unless_seen(request, drawn.encode(), "image/svg+xml")


def _attribution(job_id: str, service: Service, tenant: str) -> schemas.Attribution:
    with service.database.read() as session:
        Jobs(session, tenant).get(job_id)
        results = Results(session, tenant)
        row, selection = results.attribution(job_id), list(results.selection(job_id))
    if row is None:
        raise Problem(
            404,
            "attribution_not_there",
            f"{job_id} has no attribution.",
            "It comes with the phase `attributing`; a job whose scope selects no expert has none.",
        )
    return views.attribution(row, selection)


@router.get("/{job_id}/metrics", dependencies=[needs("jobs:read")], responses=problems(404))
def get_metrics(job_id: str, service: TheService, caller: TheCaller) -> schemas.Metrics:
    """What was measured so far, before and after; empty until the first measurement."""
    with service.database.read() as session:
        Jobs(session, caller.tenant).get(job_id)
        rows = Results(session, caller.tenant).metrics(job_id)
    in_time = sorted(rows, key=lambda row: not row.stage.startswith("before"))
    return schemas.Metrics(job=job_id, data=[views.metric(row) for row in in_time])
