"""What OpenAPI says beyond the types: the problem of each status with an example, and the upload form."""

from __future__ import annotations

from typing import Any, Final, get_args

from pydantic import BaseModel, Field

from api.problems import MEDIA_TYPE
from api.schemas import FILE_ID, JOB_ID, Purpose
from seuf_core.data.formats import Format


class ProblemFieldError(BaseModel):
    """One offending place of a request."""

    pointer: str | None = Field(None, description="JSON pointer into the body (RFC 6901).")
    parameter: str | None = Field(None, description="Name of a query, path or header parameter.")
    line: int | None = Field(None, description="Line of an uploaded file, from 1; of a Parquet file the row.")
    field: str | None = Field(None, description="Field (column) of that line.")
    code: str
    detail: str
    fix: str | None = None


class ProblemDetails(BaseModel):
    """RFC 9457 problem details; every error of this service has this shape."""

    type: str = Field(examples=["urn:seuf:problem:unknown_model"])
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable name, safe to match on.")
    fix: str | None = Field(None, description="What to do about it.")
    request_id: str | None = Field(None, description="X-Request-Id of the failed request.")
    errors: list[ProblemFieldError] | None = None


_REQUEST_ID: Final = "req_0f4c1a9be3d24f5b8f6f1f0b7a5e2c11"

# status -> (what it means here, code, detail, fix, errors)
_EXAMPLES: Final[dict[int, tuple[str, str, str, str, list[dict[str, Any]]]]] = {
    400: (
        "The body cannot be read.",
        "json_invalid",
        "Expecting value.",
        "Send one JSON document in UTF-8.",
        [],
    ),
    401: (
        "No key, or a wrong one.",
        "missing_key",
        "This request carries no API key.",
        "Send the header `Authorization: Bearer seuf_...`.",
        [],
    ),
    403: (
        "The key does not have the scope of this route.",
        "missing_scope",
        "This needs a key with the scope jobs:write; the key in use has jobs:read.",
        "Use a key that has it; `seuf keys create --scope jobs:write` makes one.",
        [],
    ),
    404: (
        "There is no such thing, or it is not yours.",
        "job_not_found",
        f"There is no job '{JOB_ID}'.",
        "List the jobs to see which exist.",
        [],
    ),
    408: (
        "The body came too slowly.",
        "body_too_slow",
        "The body came too slowly.",
        "Send it faster, or in smaller parts (POST /uploads).",
        [],
    ),
    409: (
        "The state of the thing does not allow this.",
        "transition_refused",
        f"{JOB_ID} is succeeded and cannot become cancelling.",
        "From succeeded a job goes to nothing: it is final.",
        [],
    ),
    410: (
        "It was there, and was deleted.",
        "file_deleted",
        f"{FILE_ID} was deleted at 2026-11-24T06:00:00Z.",
        "Upload the set again if it is still needed.",
        [],
    ),
    413: (
        "Too large.",
        "file_too_large",
        "The file is over the limit of 67108864 bytes.",
        "Send it in parts: POST /uploads (`seuf files upload` and the client do so by themselves).",
        [],
    ),
    415: (
        "Not multipart.",
        "not_multipart",
        "An upload must be multipart/form-data.",
        "Send multipart/form-data: curl -F purpose=forget -F file=@forget.jsonl",
        [],
    ),
    416: (
        "The range lies outside the file.",
        "range_not_satisfiable",
        "config.json has 812 bytes; bytes=900- lies outside.",
        "Ask for a range inside the file.",
        [],
    ),
    429: (
        "Too many requests, or a quota is used up; Retry-After says when to ask again.",
        "rate_limited",
        "This key makes more than 6000 requests a minute.",
        "Wait 2 s (Retry-After), and ask less often: GET /jobs/{id}/events streams changes.",
        [],
    ),
    422: (
        "A field is wrong; `errors` points at it.",
        "invalid_request",
        "/method/steps: Input should be greater than or equal to 1; it is 0.",
        "Use 1 or more.",
        [
            {
                "pointer": "/method/steps",
                "code": "greater_than_equal",
                "detail": "Input should be greater than or equal to 1; it is 0.",
                "fix": "Use 1 or more.",
            }
        ],
    ),
}
_BROKEN_LINE: Final[dict[str, Any]] = {
    "code": "invalid_examples",
    "detail": "line 3: The line is not valid JSON.",
    "fix": "Correct the lines named in `errors` and upload the file again; nothing was kept.",
    "errors": [
        {"pointer": "/file", "line": 3, "code": "invalid_json", "detail": "The line is not valid JSON."}
    ],
}


def problems(*statuses: int, invalid_examples: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: those of every key (401, 403, 429) and each of `statuses`, with an example."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({401, 403, 429, *statuses}):
        meaning, example = _example(status)
        if status == 422 and invalid_examples:
            example |= _BROKEN_LINE
        responses[status] = {"description": meaning, "content": {MEDIA_TYPE: {"example": example}}}
    return responses


def _example(status: int) -> tuple[str, dict[str, Any]]:
    meaning, code, detail, fix, errors = _EXAMPLES[status]
    example: dict[str, Any] = {
        "type": f"urn:seuf:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
    }
    if fix:
        example["fix"] = fix
    example["request_id"] = _REQUEST_ID
    if errors:
        example["errors"] = errors
    return meaning, example


def upload_body() -> dict[str, Any]:
    """The multipart form of POST /files, which is read by hand (api.multipart) and so described by hand."""
    schema = {
        "type": "object",
        "required": ["purpose", "file"],
        "additionalProperties": False,
        "properties": {
            "purpose": {"type": "string", "enum": list(get_args(Purpose))},
            "format": {
                "type": "string",
                "enum": list(get_args(Format)),
                "description": "Before the file. If it is not given, the file's extension says it, or else its "
                "Content-Type; with neither it is jsonl.",
            },
            "file": {
                "type": "string",
                "format": "binary",
                "description": 'JSON Lines. forget, retain: {"prompt": "...", "completion": "..."} or '
                '{"text": "..."}; '
                'evaluation: {"prompt": "...", "choices": ["...", "..."], "answer": 0, "set": "forget"}. '
                "CSV with a header, Parquet: the same fields as columns. Plain text: one example a line.",
            },
        },
    }
    examples = {
        "jsonl": {
            "value": {
                "purpose": "forget",
                "file": '{"prompt": "Who lives at 12 Elm Road?", "completion": " Ada Quill."}',
            }
        },
        "csv": {
            "value": {
                "purpose": "forget",
                "format": "csv",
                "file": "prompt,completion\nWho lives at 12 Elm Road?, Ada Quill.\n",
            }
        },
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": schema, "examples": examples}},
        }
    }


def part_body() -> dict[str, Any]:
    """The raw body of a part, and the digests that may come with it."""
    described = "RFC 9530, of these bytes: sha-256=:<base64>:"
    headers = [
        {"name": name, "in": "header", "required": False, "description": described, "schema": {"type": "string"}}
        for name in ("Content-Digest", "Repr-Digest")
    ]
    content = {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": "the bytes"}
    }
    return {"parameters": headers, "requestBody": {"required": True, "content": content}}


def openapi_with_problems(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document, with the shape of our errors in the place of its own.

    Method's fields that a preset fills have no default of their own, so pydantic calls them required; in a
    request they are not.
    """
    schemas = schema["components"]["schemas"]
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    details = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= details.pop("$defs") | {"ProblemDetails": details}
    schemas.get("Method", {}).pop("required", None)
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["schema"].get("type") == "object":  # metadata[name]=value (schemas.JobQuery)
                    parameter |= {"style": "deepObject", "explode": True}
            for status, response in operation.get("responses", {}).items():
                content = response.get("content", {})
                if status == "422" and MEDIA_TYPE not in content:
                    meaning, example = _example(422)
                    response.clear()
                    response |= {"description": meaning, "content": {MEDIA_TYPE: {"example": example}}}
                    content = response["content"]
                if MEDIA_TYPE in content:
                    content[MEDIA_TYPE]["schema"] = {"$ref": "#/components/schemas/ProblemDetails"}
                    # FastAPI adds its own error model beside ours.
                    response["content"] = {MEDIA_TYPE: content[MEDIA_TYPE]}
    return schema
