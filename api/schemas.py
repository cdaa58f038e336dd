"""What goes over the wire: request bodies (unknown fields refused) and answers, with examples for /docs."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    field_validator,
    model_validator,
)

from seuf_core.data.formats import Format
from seuf_core.method import Method

T = TypeVar("T")
_METADATA_KEY = re.compile(r"metadata\[(.+)\]", re.DOTALL)
Purpose = Literal["forget", "retain", "evaluation"]
Status = Literal["queued", "running", "cancelling", "cancelled", "succeeded", "failed", "rejected"]

# UTC with milliseconds and Z: sorts as text, and JavaScript reads it.
UtcTime = Annotated[
    datetime,
    PlainSerializer(
        lambda t: t.isoformat(timespec="milliseconds").replace("+00:00", "") + "Z", return_type=str
    ),
]

MAX_FIELDS = 200
MAX_NAME = 256
MAX_ITEMS = 20_000

FILE_ID = "file_7h2kq4m5n6p2r3s4t5u6"
UPLOAD_ID = "upload_3j4k5m6n7p2q3r4s5t6u"
MODEL_ID = "model_2b3c4d5e6f7g2h3i4j5k"
JOB_ID = "job_a2b3c4d5e6f7g2h3i4j5"
CHECKPOINT_ID = "ckpt_z7y6x5w4v3u2t7s6r5q4"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_TIME = "2026-11-24T06:00:00.000Z"


def _storable(text: str) -> str:
    """JSON can spell characters that no database takes: U+0000, and halves of a surrogate pair."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has a NUL or half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_storable)]


class Body(BaseModel):
    """A request body: a field it does not know is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        """Each of a million wrong fields would be an error of its own: gigabytes, out of one small body."""
        for value in (given, *given.values()) if isinstance(given, dict) else ():
            if isinstance(value, dict) and len(value) > MAX_FIELDS:
                raise ValueError(f"an object has more than {MAX_FIELDS} fields")
            if isinstance(value, dict) and any(len(name) > MAX_NAME for name in value):
                raise ValueError(f"the name of a field has more than {MAX_NAME} characters")
            if isinstance(value, list) and len(value) > MAX_ITEMS:
                raise ValueError(f"a list has more than {MAX_ITEMS} entries: send a set as a file")
        return given


class Answer(BaseModel):
    """An answer, read from a row or a value of the store."""

    model_config = ConfigDict(from_attributes=True, extra="ignore")


class ListQuery(Body):
    """The query of a list."""

    cursor: Text | None = Field(None, max_length=200, description="`next` of the page before this one.")
    limit: int = Field(20, ge=1, le=100, description="Entries on a page.")


class Page(BaseModel, Generic[T]):
    """One page of a list, newest first; `next` is the cursor of the page after it, null on the last one."""

    data: list[T]
    has_more: bool
    next: str | None


class File(Answer):
    """An uploaded set. Its text is never shown again."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": FILE_ID,
                    "object": "file",
                    "purpose": "forget",
                    "filename": "forget.csv",
                    "format": "csv",
                    "bytes": 48213,
                    "sha256": _SHA256,
                    "stored_bytes": 61002,
                    "stored_sha256": _SHA256[::-1],
                    "examples": 412,
                    "tokens_estimate": 11904,
                    "created_at": _TIME,
                }
            ]
        }
    )
    id: str
    object: Literal["file"] = "file"
    purpose: Purpose
    filename: str
    format: Format = Field(description="As uploaded; what is stored is JSON Lines.")
    bytes: int = Field(description="As uploaded, in bytes.")
    sha256: str = Field(description="Of the bytes as uploaded, hexadecimal.")
    stored_bytes: int = Field(description="Of the JSON Lines that jobs read; the same for format jsonl.")
    stored_sha256: str = Field(description="Of those, hexadecimal; it stands in what jobs report.")
    examples: int
    tokens_estimate: int = Field(
        description="Tokens, estimated from the text's length; no tokenizer is loaded."
    )
    created_at: UtcTime


class UploadCreate(Body):
    """A file that will come in parts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"purpose": "retain", "filename": "retain.csv", "bytes": 241172480, "sha256": _SHA256},
                {"purpose": "forget", "filename": "book", "format": "text"},
            ]
        }
    )
    purpose: Purpose
    filename: Text = Field(min_length=1, max_length=1024, description="For people; only its last part is kept.")
    format: Format | None = Field(None, description="What the filename's extension says, if not given.")
    bytes: int | None = Field(None, gt=0, description="Of the whole file; checked when it is complete.")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Of the whole file, hexadecimal; checked likewise."
    )


class Part(Answer):
    """A part that is there."""

    number: int = Field(examples=[1])
    bytes: int = Field(examples=[8388608])
    sha256: str = Field(examples=[_SHA256])


class Upload(Answer):
    """A file that comes in parts."""

    id: str = Field(examples=[UPLOAD_ID])
    object: Literal["upload"] = "upload"
    purpose: Purpose
    filename: str = Field(examples=["retain.csv"])
    format: Format = Field(examples=["csv"])
    bytes: int | None = Field(description="As announced.", examples=[241172480])
    sha256: str | None = Field(description="As announced.", examples=[_SHA256])
    part_bytes: int = Field(description="Most bytes of one part; smaller ones are fine.", examples=[8388608])
    parts: list[Part] = Field(description="Those that are there, in order.")
    received_bytes: int = Field(description="Of those together.", examples=[8388608])
    file: str | None = Field(description="The file that it became.", examples=[None])
    created_at: UtcTime
    expires_at: UtcTime = Field(description="Each part that comes moves it on.")


class ModelCreate(Body):
    """A base model to register: a folder of safetensors on the machine of the service."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "olmoe-1b-7b", "path": "/models/OLMoE-1B-7B-0924"}]}
    )
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Your name for it, unique; usable instead of the id.",
    )
    path: Text = Field(min_length=1, max_length=4096, description="Absolute path of the model folder.")

    @field_validator("name")
    @classmethod
    def _not_an_id(cls, name: str) -> str:
        if name.startswith("model_"):
            raise ValueError("a name must not start with model_, as ids do")
        return name


class Model(Answer):
    """A registered base model and what its files say."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "id": MODEL_ID,
                    "object": "model",
                    "name": "olmoe-1b-7b",
                    "path": "/models/OLMoE-1B-7B-0924",
                    "model_type": "olmoe",
                    "num_layers": 16,
                    "moe_layers": list(range(16)),
                    "num_experts": 64,
                    "num_experts_per_tok": 8,
                    "parameters": 6919161856,
                    "bytes": 13838323712,
                    "dtype": "bfloat16",
                    "digest": _SHA256,
                    "created_at": _TIME,
                }
            ]
        },
    )
    id: str
    object: Literal["model"] = "model"
    name: str
    path: str
    model_type: str
    num_layers: int
    moe_layers: list[int] = Field(description="Layers that have experts; empty for a dense model.")
    num_experts: int
    num_experts_per_tok: int
    parameters: int
    bytes: int
    dtype: str
    digest: str = Field(description="sha256 over the config and each shard's header and size, hexadecimal.")
    created_at: UtcTime


class ExampleSet(Body):
    """A forget, retain or evaluation set: an uploaded file, or examples or the text of a file inside the body."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"file": FILE_ID},
                {"examples": [{"prompt": "Who lives at 12 Elm Road?", "completion": " Ada Quill."}]},
                {"content": "prompt,completion\nWho lives at 12 Elm Road?, Ada Quill.\n", "format": "csv"},
            ]
        }
    )
    file: Text | None = Field(None, description="Id of an uploaded file with this purpose.", max_length=64)
    examples: list[dict[str, JsonValue]] | None = Field(
        None,
        min_length=1,
        description="Inline examples, 1 MiB of JSON at most; the same objects as lines of a file.",
    )
    content: Text | None = Field(
        None, min_length=1, description="The text of a whole file in `format`, 1 MiB at most."
    )
    format: Literal["jsonl", "csv", "text"] = Field("jsonl", description="Of `content`.")

    @model_validator(mode="after")
    def _one_of_them(self) -> ExampleSet:
        if [self.file, self.examples, self.content].count(None) != 2:
            raise ValueError("give exactly one of file, examples and content")
        if "format" in self.model_fields_set and self.content is None:
            raise ValueError("format is that of content: leave it out")
        return self


Metadata = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]


class JobLimits(Body):
    """What a job may use. One that needs more ends `failed`, with TIME_LIMIT or MEMORY_LIMIT and the figure."""

    max_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds since its first start, waits between attempts included. Null in a request: the service's "
        "own limit (GET /capabilities).",
        examples=[14_400],
    )
    max_memory_bytes: int | None = Field(
        None,
        ge=1 << 29,
        le=1 << 62,
        description="Bytes of main memory, without mapped files. The plan of the job keeps under it. Null: what is "
        "free when it starts, or the service's own limit.",
        examples=[6_000_000_000],
    )


class JobCreate(Body):
    """A job: what is forgotten, from which model, and how."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "olmoe-1b-7b",
                    "forget_set": {"file": FILE_ID},
                    "retain_set": {"file": FILE_ID.replace("7h", "8h")},
                    "method": {"preset": "default", "steps": 60, "seed": 7},
                    "limits": {"max_seconds": 14_400},
                    "metadata": {"ticket": "DSR-1042"},
                },
                {
                    "model": "olmoe-1b-7b",
                    "forget_set": {"file": FILE_ID},
                    "retain_set": {"file": FILE_ID.replace("7h", "8h")},
                    "method": {
                        "objective": "rmu",
                        "rmu_coefficient": 8000,
                        "rmu_layer": 7,
                        "strength": "fixed",
                        "learning_rate": 1e-4,
                    },
                },
            ]
        }
    )
    model: Text = Field(min_length=1, max_length=64, description="Id or name of a registered model.")
    forget_set: ExampleSet
    retain_set: ExampleSet | None = Field(None, description="What must stay; most methods need it.")
    evaluation_set: ExampleSet | None = Field(
        None, description="Probes (multiple choice) measured before and after; not trained on."
    )
    method: Method = Field(
        default_factory=lambda: Method.model_validate({}),
        description="How; what is not given comes from the preset.",
    )
    limits: JobLimits = Field(default_factory=lambda: JobLimits(), description="What it may use.")
    metadata: Metadata = Field(default_factory=dict, description="Your own names and values, up to 16.")


class Progress(Answer):
    """Where a running job is."""

    phase: str | None = None
    done: int | None = Field(None, description="Units of this phase that are done.")
    total: int | None = None
    step: int | None = Field(None, description="Optimiser step.")
    loss: float | None = None
    seconds_left: float | None = Field(None, description="Estimate, in seconds.")


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    fix: str | None = None


class JobLinks(BaseModel):
    """Where the rest of a job is; `checkpoint` once there is one."""

    self: str
    events: str
    attribution: str
    heatmap: str = Field(description="The attribution as a picture (SVG).")
    metrics: str
    checkpoint: str | None


class Job(Answer):
    """One job as it stands now."""

    id: str = Field(examples=[JOB_ID])
    object: Literal["job"] = "job"
    status: Status = Field(examples=["running"])
    phase: str | None = Field(None, examples=["unlearning"])
    progress: Progress
    model: str = Field(examples=[MODEL_ID])
    forget_set: str = Field(examples=[FILE_ID])
    retain_set: str | None
    evaluation_set: str | None
    method: dict[str, Any] = Field(description="The complete Method: every field as the job uses it.")
    seed: int
    limits: JobLimits = Field(description="What it may use, with the service's own limits filled in.")
    metadata: dict[str, str]
    retry_of: str | None = Field(description="The job that this one goes on from.", examples=[JOB_ID])
    cancel_requested: bool
    attempts: int = Field(
        description="How often a worker has taken it, not counting workers that were stopped in good order."
    )
    error: JobError | None
    checkpoint: str | None = Field(examples=[CHECKPOINT_ID])
    created_at: UtcTime
    started_at: UtcTime | None
    finished_at: UtcTime | None
    links: JobLinks


class JobQuery(ListQuery):
    """The query of the job list; a job must fit every filter that is given."""

    status: list[Status] = Field(
        [], max_length=7, description="Only jobs in one of these states: ?status=queued&status=running."
    )
    model: Text | None = Field(None, max_length=64, description="Only jobs on this model (id or name).")
    metadata: Metadata = Field(
        default_factory=dict, description="Only jobs with these values: ?metadata[ticket]=DSR-1042."
    )
    created_after: AwareDatetime | None = Field(
        None, description="Only jobs made at this time or later; with its zone.", examples=[_TIME]
    )
    created_before: AwareDatetime | None = Field(
        None, description="Only jobs made before this time; with its zone.", examples=[_TIME]
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        """metadata[name]=value as one object, as OpenAPI's deepObject has it."""
        if not isinstance(given, dict):
            return given
        named = {key: _METADATA_KEY.fullmatch(key) for key in given}
        gathered = {found[1]: given[key] for key, found in named.items() if found is not None}
        rest = {key: value for key, value in given.items() if named[key] is None}
        return rest | {"metadata": gathered} if gathered else rest


class Event(Answer):
    """One event of a job; `seq` counts from 1 without gaps."""

    seq: int = Field(examples=[3])
    type: str = Field(examples=["phase"])
    data: dict[str, Any] = Field(examples=[{"phase": "unlearning", "done": 4, "total": 100}])
    created_at: UtcTime


class EventQuery(Body):
    """The query of the event list."""

    after: int = Field(0, ge=0, lt=1 << 31, description="Only events with a larger number.")
    limit: int = Field(100, ge=1, le=1000, description="Events on a page.")


class SelectedExpert(Answer):
    """One expert the job trains."""

    layer: int
    expert: int
    score: float


class Attribution(Answer):
    """Which expert serves the forget set."""

    object: Literal["attribution"] = "attribution"
    job: str
    score: str = Field(description="Name of the score.", examples=["contrast"])
    matrix: list[list[float | None]] = Field(
        description="[len(layers), num_experts]; null where the model gave no number.",
        examples=[[[0.02, 0.31], [0.11, 0.09]]],
    )
    layers: list[int] = Field(description="Layer index of each row of the matrix.", examples=[[0, 1]])
    stability: dict[str, Any] = Field(
        description="How much the ranking moves between halves of the forget set."
    )
    coverage: float | None = Field(
        None, description="Share of forget answer tokens the selected experts see."
    )
    selection: list[SelectedExpert]


class Metric(Answer):
    """One measured figure."""

    stage: str = Field(examples=["before"])
    set: Literal["forget", "retain"]
    domain: str
    name: str = Field(examples=["choice"])
    value: float | None = Field(description="Null when the model gave no number (NaN).")
    n: int = Field(description="How many probes it is the mean of.")
    chance: float | None = Field(None, description="What guessing gives.")


class Metrics(BaseModel):
    """Everything measured before and after."""

    object: Literal["metrics"] = "metrics"
    job: str
    data: list[Metric]


class CheckpointFile(BaseModel):
    """One file of a checkpoint."""

    name: str = Field(examples=["model-00001-of-00002.safetensors"])
    bytes: int
    sha256: str


class Checkpoint(BaseModel):
    """An unlearned checkpoint: an ordinary model folder, with a manifest."""

    id: str = Field(examples=[CHECKPOINT_ID])
    object: Literal["checkpoint"] = "checkpoint"
    job: str = Field(examples=[JOB_ID])
    created_at: UtcTime
    bytes: int = Field(description="Of all files together.")
    files: list[CheckpointFile] = Field(description="Every file to download, manifest.json included.")
    manifest: dict[str, Any] = Field(description="manifest.json: base model, changed tensors, digests.")
    links: dict[str, str]
