"""CSV and plain text as rows: what comes in pieces becomes the fields of one record after another.

A row is (line, fields), or (line, LineProblem) for one that cannot be read; lines count from 1. What the fields may
hold is checked where all formats come together (seuf_core.data.reader). At most one record is held.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any

from seuf_core.data.lines import LineProblem, Lines, parse_value
from seuf_core.data.records import Limits, Purpose, fields_of

Row = tuple[int, dict[str, Any] | LineProblem]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SAVE_AS = 'save as "CSV UTF-8 (comma delimited)"'


class TextRows:
    """Plain text: one example of running text a line; blank lines are passed over."""

    def __init__(self, limits: Limits) -> None:
        self._lines = Lines(limits.max_line_bytes)
        self._limits = limits
        self._number = 0

    def feed(self, piece: bytes) -> Iterator[Row]:
        """The rows that end in `piece`."""
        if self._number > self._limits.max_lines:
            return
        for line in self._lines.feed(piece):
            yield from self._row(line)
            if self._number > self._limits.max_lines:
                yield self._number, _too_many_lines(self._limits)
                return

    def finish(self) -> Iterator[Row]:
        """The last row, if its line has no end."""
        for line in self._lines.rest():
            yield from self._row(line)

    def _row(self, line: bytes | None) -> Iterator[Row]:
        self._number += 1
        try:
            if line is None:
                limit = self._limits.max_line_bytes
                message = f"The line has more than {limit} bytes: break it, one example a line."
                raise LineProblem("line_too_long", message)
            text = _decoded(line, first=self._number == 1).removesuffix("\r")
            if text.strip():
                yield self._number, {"text": text}
        except LineProblem as problem:
            yield self._number, problem


class CsvRows:
    """CSV by RFC 4180: commas, a header that names the fields, cells in quotes may hold commas and line breaks.

    An empty cell is an absent field. After an error that puts every later line in doubt (the header, a quote that
    never closes) nothing more is read.
    """

    def __init__(self, purpose: Purpose, limits: Limits) -> None:
        self._purpose = purpose
        self._limits = limits
        self._known = fields_of(purpose)
        self._held = bytearray()
        self._quotes = 0
        self._next_line = 1
        self._number = 0
        self._columns: list[str] | None = None
        self._ended = False
        # The module's own limit is one for the whole process, and below a line's.
        csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes))

    def feed(self, piece: bytes) -> Iterator[Row]:
        """The rows that end in `piece`."""
        start = 0
        while not self._ended and start < len(piece):
            end = piece.find(b"\n", start) + 1 or len(piece)
            yield from self._collect(piece[start:end])
            start = end

    def finish(self) -> Iterator[Row]:
        """The last row, if its line has no end."""
        if self._held and not self._ended:
            if self._quotes % 2:
                yield self._next_line, self._not_closed()
            else:
                yield from self._record()

    def _collect(self, part: bytes) -> Iterator[Row]:
        """A record is whole at the end of a line where every quote has its partner: inside a cell they are doubled."""
        if len(self._held) + len(part) > self._limits.max_line_bytes:
            limit = self._limits.max_line_bytes
            too_long = LineProblem(
                "line_too_long", f"The record has more than {limit} bytes: split the text."
            )
            self._ended = True
            yield self._next_line, self._not_closed() if self._quotes % 2 else too_long
            return
        self._held += part
        self._quotes += part.count(b'"')
        if part.endswith(b"\n") and self._quotes % 2 == 0:
            yield from self._record()

    def _not_closed(self) -> LineProblem:
        return LineProblem(
            "quote_not_closed", 'A quote opens here and never closes: a quote inside a cell is written "".'
        )

    def _record(self) -> Iterator[Row]:
        record, line = bytes(self._held), self._next_line
        self._number += 1
        if self._number > self._limits.max_lines:
            self._ended = True
            yield line, _too_many_lines(self._limits)
            return
        self._next_line += record.count(b"\n")
        self._held.clear()
        self._quotes = 0
        try:
            text = _decoded(record, first=line == 1).removesuffix("\n").removesuffix("\r")
            if not text.strip():
                return
            cells = _cells(text)
            if self._columns is None:
                self._columns = self._header(cells)
            else:
                yield line, self._fields(cells)
        except LineProblem as problem:
            self._ended = self._columns is None
            yield line, problem

    def _header(self, cells: list[str]) -> list[str]:
        """The columns. A file without a header begins with a text of the set, so no name is quoted."""
        names = [cell.strip() for cell in cells]
        say = f"The first line names the columns, out of {', '.join(self._known)}."
        if len(names) == 1 and re.search(r"[;\t|]", names[0]):
            message = f"Columns must be separated by commas, not by semicolons or tabs: {_SAVE_AS}."
            raise LineProblem("wrong_separator", message)
        for number, name in enumerate(names, start=1):
            if name not in self._known:
                raise LineProblem("unknown_column", f"Column {number} has no name that is known. {say}")
            if names.index(name) != number - 1:
                raise LineProblem("duplicate_column", f"Column {name!r} stands twice: keep one.", name)
        return names

    def _fields(self, cells: list[str]) -> dict[str, Any]:
        assert self._columns is not None
        if len(cells) != len(self._columns):
            message = (
                f"The line has {len(cells)} cells, the header {len(self._columns)}: "
                "put a cell that holds a comma or a line break in quotes."
            )
            raise LineProblem("wrong_columns", message)
        given = {name: cell for name, cell in zip(self._columns, cells, strict=True) if cell}
        fields: dict[str, Any] = dict(given)
        if self._purpose == "evaluation":
            if "choices" in given:
                fields["choices"] = self._list(given["choices"])
            if re.fullmatch(r"[0-9]{1,9}", given.get("answer", "")):
                fields["answer"] = int(given["answer"])
        return fields

    def _list(self, cell: str) -> Any:
        try:
            return parse_value(cell, self._limits.max_depth)
        except LineProblem as problem:
            message = f'Column \'choices\' must hold a JSON list such as ["a", "b"]: {problem.message}'
            raise LineProblem("wrong_choices", message, "choices") from None


def _too_many_lines(limits: Limits) -> LineProblem:
    return LineProblem("too_many_lines", f"The file has more than {limits.max_lines} lines.")


def _cells(text: str) -> list[str]:
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error:
        message = 'A cell with a quote or a line break in it must stand in quotes, and the quote inside is written "".'
        raise LineProblem("wrong_quotes", message) from None


def _decoded(line: bytes, *, first: bool) -> str:
    if first:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    try:
        text = line.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        message = f"Byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8."
        raise LineProblem("not_utf8", message) from None
    if "\0" in text:
        raise LineProblem("nul_character", "The line holds a NUL character: save the file as text in UTF-8.")
    return text
