"""One line of a JSON Lines file, read strictly: bytes to a flat dict, or the rule that was broken.

Torch-free. Stricter than `json.loads`, which takes duplicate keys (the last one wins), NaN, and escapes that
are half a character: each of those would make two programs read two different sets out of one file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Never

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineProblem(Exception):  # noqa: N818 -- not an error of the program: the reader collects it
    """A broken rule of one line: a stable code, a message without any of the line's text, the field if it is one."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field


class Lines:
    """Cuts bytes that come in pieces into lines, and never holds more than `max_bytes` of one."""

    def __init__(self, max_bytes: int) -> None:
        self.held = bytearray()
        self._max_bytes = max_bytes
        self._overlong = False

    def feed(self, piece: bytes) -> Iterator[bytes | None]:
        """Every line that ends in `piece`, without its newline; None for one that is too long."""
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            self._collect(piece[start:end])
            yield self._taken()
            start = end + 1
        self._collect(piece[start:])

    def rest(self) -> Iterator[bytes | None]:
        """The last line, if it has no newline."""
        if self.held or self._overlong:
            yield self._taken()

    def _collect(self, part: bytes) -> None:
        if self._overlong or len(self.held) + len(part) > self._max_bytes:
            self._overlong = True
            self.held.clear()
        else:
            self.held += part

    def _taken(self) -> bytes | None:
        line = None if self._overlong else bytes(self.held)
        self.held.clear()
        self._overlong = False
        return line


def parse_line(line: bytes, *, first: bool, max_depth: int) -> dict[str, Any]:
    """The fields of one line; fields that are null count as absent.

    Args:
        line: without its newline.
        first: whether it is the first of its file, where a byte order mark may stand.
        max_depth: how deep objects and arrays may nest; a flat object is 1.

    Raises:
        LineProblem: byte_order_mark, not_utf8, too_deep, not_json, not_a_number, duplicate_key,
            half_character, not_an_object.
    """
    if first and line.startswith(_BYTE_ORDER_MARK):
        raise LineProblem(
            "byte_order_mark", "The file starts with a byte order mark: save it as plain UTF-8."
        )
    try:
        text = line.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise LineProblem(
            "not_utf8", f"Byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8."
        ) from None
    value = parse_value(text, max_depth)
    if not isinstance(value, dict):
        raise LineProblem("not_an_object", 'The line is not a JSON object: write {"field": "value", ...}.')
    return {key: item for key, item in value.items() if item is not None}


def parse_value(text: str, max_depth: int) -> Any:
    """One JSON value, read as strictly. `text` is strict UTF-8's: it holds no half of a surrogate pair itself."""
    # Before json.loads: its parser recurses, and how deep it can go depends on who called us.
    if _depth(text) > max_depth:
        raise LineProblem("too_deep", f"Objects and arrays nest deeper than {max_depth}.")
    value = _loads(text)
    if "\\u" in text:
        _refuse_half_characters(value)
    return value


def _depth(text: str) -> int:
    if text.count("{") + text.count("[") <= 1:
        return 1
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except json.JSONDecodeError as error:
        raise LineProblem("not_json", f"Not JSON: {error.msg} (column {error.colno}).") from None
    except RecursionError:
        raise LineProblem("too_deep", "Objects and arrays nest too deeply.") from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise LineProblem("not_json", "Not JSON that can be read: a number has too many digits.") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise LineProblem("duplicate_key", "A field stands twice: keep one of them.")
    return fields


def _no_constants(name: str) -> Never:
    raise LineProblem("not_a_number", f"{name} is not JSON: use a number, or leave the field out.")


def _refuse_half_characters(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LineProblem(
                "half_character", "An escape \\ud800 to \\udfff stands alone: write both halves, or UTF-8."
            ) from None
    elif isinstance(value, list):
        for item in value:
            _refuse_half_characters(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_half_characters(key)
            _refuse_half_characters(item)
