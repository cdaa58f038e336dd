"""Pydantic's error list as our field errors: JSON pointers that exist in the body, and a fix for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

# By pydantic's error type; braces take values of the error's context.
_FIX: Final[dict[str, str]] = {
    "missing": "Add it.",
    "extra_forbidden": "Remove it; the fields of this request are listed in /openapi.json.",
    "string_type": "Send a JSON string.",
    "list_type": "Send a JSON array.",
    "model_attributes_type": "Send a JSON object.",
    "model_type": "Send a JSON object.",
    "dict_type": "Send a JSON object.",
    "json_invalid": "Send one JSON document in UTF-8.",
    "greater_than_equal": "Use {ge} or more.",
    "greater_than": "Use more than {gt}.",
    "less_than_equal": "Use {le} or less.",
    "less_than": "Use less than {lt}.",
    "literal_error": "Use one of {expected}.",
    "string_pattern_mismatch": "Write it as {pattern} says.",
    "string_too_short": "Use {min_length} characters or more.",
    "string_too_long": "Use {max_length} characters or fewer.",
    "int_type": "Send a whole number.",
    "int_parsing": "Send a whole number.",
    "int_from_float": "Send a whole number.",
    "float_type": "Send a number.",
    "float_parsing": "Send a number.",
    "finite_number": "Send a finite number.",
    "tuple_type": "Send a JSON array.",
    "too_short": "Give {min_length} or more.",
    "too_long": "Give {max_length} or fewer.",
}
_ANY_FIX: Final = "Correct it; its description says what it takes."


def field_errors(errors: Sequence[Mapping[str, Any]], body: Any) -> list[dict[str, Any]]:
    """Keyword arguments of `FieldError`, one per offending place.

    The alternatives of a union fail one by one in pydantic; here they are one error, "this, or that". Fields
    that do not go together (seuf_core.misfits.Misfit) are one error in pydantic; here each that was given is one.
    """
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for error in errors:
        for field in _places(error, body):
            key = (field.get("pointer", ""), field.get("parameter", ""))
            if key in merged:
                before = merged[key]
                if field["detail"] not in before["detail"]:
                    before |= _either(before, field)
            else:
                merged[key] = field
    return list(merged.values())


def _either(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """Two alternatives that failed at one place, as one sentence and one fix."""
    (first, value), (second, _) = (f["detail"].rstrip(".").partition("; it is ")[::2] for f in (one, other))
    detail = f"{first}, or {second.removeprefix('Input should be ')}"
    fixes = [str(f["fix"] or "").rstrip(".") for f in (one, other)]
    return {
        "detail": f"{detail}; it is {value}." if value else f"{detail}.",
        "fix": f"{fixes[0]}, or {fixes[1][:1].lower()}{fixes[1][1:]}.",
    }


def _places(error: Mapping[str, Any], body: Any) -> list[dict[str, Any]]:
    """The error at its place, or at each field that it is about."""
    place = _one(error, body)
    context = error.get("ctx") or {}
    if "fields" not in context:
        return [place]
    place |= {"detail": context["problem"], "fix": context["fix"]}
    given = _value_at(error["loc"][1:], body)
    named = [name for name in context["fields"] if isinstance(given, dict) and name in given]
    return [place | {"pointer": f"{place['pointer']}/{name}"} for name in named] or [place]


def _value_at(location: Sequence[Any], body: Any) -> Any:
    for part in location:
        body = body.get(part) if isinstance(body, dict) else None
    return body


def _one(error: Mapping[str, Any], body: Any) -> dict[str, Any]:
    location = list(error["loc"])
    kind = str(error["type"])
    field: dict[str, Any] = {"code": kind, "detail": _sentence(error)}
    if location and location[0] == "body":
        field["pointer"] = "" if kind == "json_invalid" else _pointer(location[1:], body, kind)
    else:
        # ("query", name), and behind it the place in a list or an object.
        field["parameter"] = str(location[:2][-1]) if location else ""
    field["fix"] = _FIX.get(kind, _ANY_FIX).format_map(error.get("ctx") or {})
    if kind == "literal_error" and " or " not in field["fix"]:  # a word beside numbers: "auto"
        field["fix"] = field["fix"].replace("one of ", "")
    elif kind == "literal_error":  # the fix lists them
        field["detail"] = f"{error['input']!r:.60} is none of the choices."
    if kind == "value_error":
        field["code"] = "invalid_value"
    return field


def _sentence(error: Mapping[str, Any]) -> str:
    """Pydantic's message without its prefix, with the value when it is a short plain one."""
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    if error["type"] not in ("missing", "extra_forbidden") and isinstance(value, (int, float, str)):
        shown = repr(value)
        if len(shown) <= 60:
            return f"{message}; it is {shown}."
    return message if message.endswith(".") else f"{message}."


def _pointer(location: Sequence[Any], body: Any, kind: str) -> str:
    """RFC 6901 pointer; parts that name a branch of a union and not a place in the body are left out."""
    pointer, value = "", body
    for position, part in enumerate(location):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        elif not (kind == "missing" and position == len(location) - 1):
            continue
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer
