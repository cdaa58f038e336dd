"""What OpenAPI says beyond the types: the problem of each status with an example, and the upload form."""

from __future__ import annotations

from typing import Any, Final, get_args

from pydantic import BaseModel, Field

from api.problems import MEDIA_TYPE
from api.schemas import JOB_ID, Purpose


class ProblemFieldError(BaseModel):
    """One offending place of a request."""

    pointer: str | None = Field(None, description="JSON pointer into the body (RFC 6901).")
    parameter: str | None = Field(None, description="Name of a query, path or header parameter.")
    line: int | None = Field(None, description="Line of an uploaded file, from 1.")
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
    404: (
        "There is no such thing, or it is not yours.",
        "job_not_found",
        f"There is no job '{JOB_ID}'.",
        "List the jobs to see which exist.",
        [],
    ),
    409: (
        "The state of the thing does not allow this.",
        "transition_refused",
        f"{JOB_ID} is succeeded and cannot become cancelling.",
        "From succeeded a job goes to nothing: it is final.",
        [],
    ),
    413: (
        "Too large.",
        "file_too_large",
        "The file is over the limit of 67108864 bytes.",
        "Split it into several files, or raise SEUF_MAX_UPLOAD_BYTES.",
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
    """The `responses` of a route: 401 and each of `statuses` as problem details with an example."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({401, *statuses}):
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
    """The multipart form of POST /files, which is read by hand (api.upload) and so described by hand."""
    schema = {
        "type": "object",
        "required": ["purpose", "file"],
        "additionalProperties": False,
        "properties": {
            "purpose": {"type": "string", "enum": list(get_args(Purpose))},
            "file": {
                "type": "string",
                "format": "binary",
                "description": 'JSON Lines. forget, retain: {"prompt": "...", "completion": "..."} or '
                '{"text": "..."}; '
                'evaluation: {"prompt": "...", "choices": ["...", "..."], "answer": 0, "set": "forget"}.',
            },
        },
    }
    example = {
        "purpose": "forget",
        "file": '{"prompt": "Who lives at 12 Elm Road?", "completion": " Ada Quill."}',
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": schema, "example": example}},
        }
    }


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
