"""The answers of the service as typed dictionaries: exactly the JSON of the HTTP interface."""

from __future__ import annotations

from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

Purpose = Literal["forget", "retain", "evaluation"]
Format = Literal["jsonl", "csv", "parquet", "text"]
Status = Literal["queued", "running", "cancelling", "cancelled", "succeeded", "failed", "rejected"]
TERMINAL: frozenset[str] = frozenset({"cancelled", "succeeded", "failed", "rejected"})

T = TypeVar("T")


class Page(TypedDict, Generic[T]):
    """One page of a list; `next` is the cursor of the page after it, None on the last one."""

    data: list[T]
    has_more: bool
    next: str | None


class File(TypedDict):
    """An uploaded forget, retain or evaluation set; `stored_*` of the JSON Lines that jobs read."""

    id: str
    object: Literal["file"]
    purpose: Purpose
    filename: str
    format: Format
    bytes: int
    sha256: str
    stored_bytes: int
    stored_sha256: str
    examples: int
    tokens_estimate: int
    created_at: str


class Part(TypedDict):
    """A part of an upload that is there."""

    number: int
    bytes: int
    sha256: str


class Upload(TypedDict):
    """A file that comes in parts; `file` is what it became."""

    id: str
    object: Literal["upload"]
    purpose: Purpose
    filename: str
    format: Format
    bytes: int | None
    sha256: str | None
    part_bytes: int
    parts: list[Part]
    received_bytes: int
    file: str | None
    created_at: str
    expires_at: str


class Model(TypedDict):
    """A registered base model."""

    id: str
    object: Literal["model"]
    name: str
    path: str
    model_type: str
    num_layers: int
    moe_layers: list[int]
    num_experts: int
    num_experts_per_tok: int
    parameters: int
    bytes: int
    dtype: str
    digest: str
    created_at: str


class Progress(TypedDict):
    """Where a running job is; `step`, `loss` and `seconds_left` (seconds) while it trains."""

    phase: str | None
    done: int | None
    total: int | None
    step: int | None
    loss: float | None
    seconds_left: float | None


class JobError(TypedDict):
    """Why a job failed."""

    code: str
    message: str
    fix: str | None


class JobLimits(TypedDict, total=False):
    """What a job may use: seconds since its first start, bytes of main memory."""

    max_seconds: float | None
    max_memory_bytes: int | None


class Job(TypedDict):
    """One job; times are ISO 8601 in UTC."""

    id: str
    object: Literal["job"]
    status: Status
    phase: str | None
    progress: Progress
    model: str
    forget_set: str
    retain_set: str | None
    evaluation_set: str | None
    method: dict[str, Any]
    seed: int
    limits: JobLimits
    metadata: dict[str, str]
    retry_of: str | None
    cancel_requested: bool
    attempts: int
    error: JobError | None
    checkpoint: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: dict[str, str | None]


class Event(TypedDict):
    """One numbered event of a job; `seq` counts from 1 without gaps."""

    seq: int
    type: str
    data: dict[str, Any]
    created_at: str


class SelectedExpert(TypedDict):
    """One expert the job trains."""

    layer: int
    expert: int
    score: float


class Attribution(TypedDict):
    """Which expert serves the forget set: `matrix` is [len(layers), num_experts]."""

    object: Literal["attribution"]
    job: str
    score: str
    matrix: list[list[float | None]]
    layers: list[int]
    stability: dict[str, Any]
    coverage: float | None
    selection: list[SelectedExpert]


class Metric(TypedDict):
    """One measured figure; `chance` is what guessing gives, None where guessing has no meaning."""

    stage: str
    set: Literal["forget", "retain"]
    domain: str
    name: str
    value: float | None
    n: int
    chance: float | None


class Metrics(TypedDict):
    """Everything measured before and after."""

    object: Literal["metrics"]
    job: str
    data: list[Metric]


class CheckpointFile(TypedDict):
    """One file of a checkpoint; `sha256` in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Checkpoint(TypedDict):
    """An unlearned checkpoint: its files with their digests, and what changed against the base model."""

    id: str
    object: Literal["checkpoint"]
    job: str
    created_at: str
    bytes: int
    files: list[CheckpointFile]
    manifest: dict[str, Any]
    links: dict[str, str]


class Submit(TypedDict):
    """The body of POST /jobs; without metadata, of POST /jobs/estimate."""

    model: str
    forget_set: dict[str, Any]
    retain_set: NotRequired[dict[str, Any]]
    evaluation_set: NotRequired[dict[str, Any]]
    method: NotRequired[dict[str, Any]]
    limits: NotRequired[JobLimits]
    metadata: NotRequired[dict[str, str]]


class PlannedPhase(TypedDict):
    """One phase of a job as planned; sizes in bytes, `memory` by what it is for."""

    name: str
    bytes_read: int
    bytes_written: int
    flops: int
    seconds: float | None
    memory: dict[str, int]
    peak_bytes: int


class Estimate(TypedDict):
    """What a job would read, hold, compute and write; sizes in bytes, `seconds` None where no worker is known."""

    object: Literal["estimate"]
    device: str
    device_why: str
    residency: Literal["whole", "suffix", "streamed"]
    residency_why: str
    fits: bool
    budget_bytes: int
    budget_why: str
    peak_bytes: int
    host_bytes: int
    device_bytes: int
    bytes_read: int
    bytes_written: int
    micro_batch_tokens: int
    lowest_layer: int | None
    bound: bool
    experts: int
    phases: list[PlannedPhase]
    runs: int
    seconds: float | None
    seconds_all: float | None
    seconds_missing: str | None
    tokens_counted: Literal["tokenizer", "bytes"]
    calibration: dict[str, Any] | None
    notes: list[str]


class AuditRow(TypedDict):
    """One act in the audit log; `hash` covers the other fields, with the hash of the row before."""

    tenant: str
    seq: int
    who: str
    what: str
    object: str
    request_id: str | None
    at: str
    previous_hash: str
    hash: str


class AuditHead(TypedDict):
    """Signed: row `seq` was the last one. `key_id` is the public key in hexadecimal, `signature` is base64."""

    tenant: str
    seq: int
    hash: str
    at: str
    key_id: str
    signature: str


class AuditKey(TypedDict):
    """The public key of the signed heads."""

    key_id: str
    algorithm: Literal["ed25519"]
    pem: str


class Webhook(TypedDict):
    """An address that is told of events; `secret` only where it was just made."""

    id: str
    object: Literal["webhook"]
    url: str
    description: str
    events: list[str]
    disabled: bool
    disabled_at: str | None
    failing_since: str | None
    previous_secret_until: str | None
    created_at: str
    secret: NotRequired[str]


class WebhookAttempt(TypedDict):
    """One try to deliver: the status of the answer, or why there was none."""

    number: int
    at: str
    milliseconds: int
    status_code: int | None
    error: str | None


class WebhookDelivery(TypedDict):
    """A message on its way to a webhook; `message` is what the receiver sees as webhook-id."""

    id: str
    object: Literal["webhook_delivery"]
    message: str
    type: str
    job: str | None
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: str | None
    delivered_at: str | None
    created_at: str
    log: list[WebhookAttempt]
