"""One streaming reader of sets for service and library, whatever their format.

Torch-free. `RecordReader` reads JSON Lines, the format that is stored and that jobs read; `SetReader` reads
every format and turns it into that one. Both take bytes in pieces of any size and hold at most one record of
them, so that a file of gigabytes needs megabytes. Messages name line, field and rule, never the text.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from seuf_core.data.formats import Format, contradiction, format_of
from seuf_core.data.lines import LineProblem, Lines, parse_line
from seuf_core.data.records import BYTES_PER_TOKEN, Example, Limits, Probe, Purpose, Record, record_of
from seuf_core.data.rows import CsvRows, Row, TextRows
from seuf_core.errors import DataError

ERRORS_KEPT = 20
ERRORS_COUNTED = 1000  # nobody needs to know of more, and each takes time
READ_BYTES = 1 << 20
_HEAD_BYTES = 1024  # enough to recognise a file that is not what it is called


@dataclass(frozen=True, slots=True)
class LineError:
    """One broken rule. `line` counts from 1, blank lines included (Parquet: rows); 0 is the file as a whole."""

    line: int
    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What a file holds. `examples` counts its valid records only; `errors` are the first of `error_count`.

    After ERRORS_COUNTED errors, or too many lines, nothing more is looked at: the counts are then lower bounds.

    Attributes:
        facts: distinct facts among the examples.
        lines: of the JSON Lines.
        bytes, sha256: of the JSON Lines; the digest in hex.
        sent_bytes, sent_sha256: of the bytes as fed, in whatever format; the same for JSON Lines.
        tokens_estimate: UTF-8 bytes of all texts / 4.
    """

    purpose: Purpose
    format: Format
    examples: int
    facts: int
    lines: int
    bytes: int
    sha256: str
    sent_bytes: int
    sent_sha256: str
    tokens_estimate: int
    errors: tuple[LineError, ...]
    error_count: int

    @property
    def ok(self) -> bool:
        """Whether the file can be used: at least one example and no error."""
        return self.error_count == 0

    def place(self, error: LineError) -> str:
        """Where an error is, for a person: "line 3", "row 3"; "" for the file as a whole."""
        return f"{'row' if self.format == 'parquet' else 'line'} {error.line}" if error.line else ""


class RecordReader:
    """Reads one JSON Lines file, fed in pieces: `feed` bytes as they arrive, `finish` once.

    Memory: at most limits.max_line_bytes + the longest piece fed, + some 300 bytes an example.
    """

    def __init__(
        self,
        purpose: Purpose,
        limits: Limits | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        """
        Args:
            purpose: which kind of record is expected.
            limits: bounds; the defaults of Limits when None.
            on_record: called with every valid Example (forget, retain) or Probe (evaluation), in file order.
        """
        self.purpose = purpose
        self.limits = limits or Limits()
        self.on_record = on_record
        self.lines = Lines(self.limits.max_line_bytes)
        self._digest = hashlib.sha256()
        self._lines = self._bytes = self._text_bytes = self._examples = self._error_count = 0
        self._lines_by_id: dict[bytes, int] = {}
        self._facts: set[bytes] = set()
        self._errors: list[LineError] = []

    @property
    def stopped(self) -> bool:
        """Whether the file is refused anyhow, so that nothing more of it is looked at."""
        return self._error_count >= ERRORS_COUNTED or self._lines > self.limits.max_lines

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; lines may be cut anywhere.

        Raises:
            DataError: file_too_large, as soon as the bytes pass limits.max_bytes: stop reading then.
        """
        self._count(piece, self.limits.max_bytes)
        if self.stopped:
            return
        for line in self.lines.feed(piece):
            self._end_line(line)
            if self.stopped:
                return

    def row(self, line: bytes, at: int) -> None:
        """Take one whole line that was made of line (row) `at` of a file in another format.

        Raises:
            DataError: file_too_large, as soon as the lines together pass limits.max_stored_bytes.
        """
        self._count(line + b"\n", self.limits.max_stored_bytes)
        self._end_line(line if len(line) <= self.limits.max_line_bytes else None, at)

    def refuse(self, problem: LineProblem, at: int) -> None:
        """A line (row) of a file in another format that cannot be made a line here."""
        self._error(at, problem.code, problem.message, problem.field)

    def finish(self) -> FileSummary:
        """Take the last line, which needs no newline, and give the result. Call once."""
        if not self.stopped:
            for line in self.lines.rest():
                self._end_line(line)
        if self._examples == 0 and self._error_count == 0:
            self._error(0, "no_examples", "The file has no example: give at least one.", None)
        digest = self._digest.hexdigest()
        return FileSummary(
            purpose=self.purpose,
            format="jsonl",
            examples=self._examples,
            facts=len(self._facts),
            lines=self._lines,
            bytes=self._bytes,
            sha256=digest,
            sent_bytes=self._bytes,
            sent_sha256=digest,
            tokens_estimate=-(-self._text_bytes // BYTES_PER_TOKEN),
            errors=tuple(self._errors),
            error_count=self._error_count,
        )

    def _count(self, piece: bytes, limit: int | None) -> None:
        self._bytes += len(piece)
        check_size(self._bytes, limit)
        self._digest.update(piece)

    def _end_line(self, line: bytes | None, at: int | None = None) -> None:
        self._lines += 1
        at = self._lines if at is None else at
        try:
            if line is None:
                limit = self.limits.max_line_bytes
                raise LineProblem("line_too_long", f"The line has more than {limit} bytes: split the text.")
            if self._lines > self.limits.max_lines:
                raise LineProblem("too_many_lines", f"The file has more than {self.limits.max_lines} lines.")
            # JSON's own white space, and nothing else, makes a blank line or pads a full one.
            if line := line.strip(b" \t\r"):
                self._take(line, at)
        except LineProblem as problem:
            self.refuse(problem, at)

    def _take(self, line: bytes, at: int) -> None:
        if self._examples >= self.limits.max_examples:
            limit = self.limits.max_examples
            raise LineProblem("too_many_examples", f"The file has more than {limit} examples: split it.")
        fields = parse_line(line, first=self._lines == 1, max_depth=self.limits.max_depth)
        record = record_of(self.purpose, fields, self._lines, self.limits)
        if (earlier := self._lines_by_id.setdefault(_short(record.id), at)) != at:
            message = f"The id is the same as on line {earlier}: ids must differ."
            raise LineProblem("duplicate_id", message, "id")
        self._examples += 1
        self._facts.add(_short(record.fact))
        texts = record.choices if isinstance(record, Probe) else (record.completion, record.alternative)
        self._text_bytes += sum(len(text.encode()) for text in (record.prompt, *texts))
        if self.on_record is not None:
            self.on_record(record)

    def _error(self, line: int, code: str, message: str, field: str | None) -> None:
        self._error_count += 1
        if len(self._errors) < ERRORS_KEPT:
            self._errors.append(LineError(line, code, message, field))


class SetReader:
    """Reads one file of any format, fed in pieces, and writes it as JSON Lines: `feed`, then `finish` once.

    JSON Lines are written as they came. Every other format becomes one line a record, numbered from 1, so that a
    record without an id is the same one whether service or library read it. Memory: as RecordReader; a Parquet
    file waits on disk until it is whole, since what it holds is said at its end.
    """

    def __init__(
        self,
        purpose: Purpose,
        format: Format,  # noqa: A002  (what it is called everywhere)
        limits: Limits | None = None,
        *,
        on_record: Callable[[Record], None] | None = None,
        out: BinaryIO | None = None,
        scratch: Path | None = None,
    ) -> None:
        """
        Args:
            format: what the file is said to be; one that is recognised as another is refused.
            out: takes the JSON Lines.
            scratch: folder for a Parquet file that is coming in; the system's when None.

        Raises:
            DataError: text_without_choices, for an evaluation set as plain text.
        """
        check_format(purpose, format)
        self.format = format
        self.limits = limits or Limits()
        self._records = RecordReader(purpose, self.limits, on_record)
        self._out = out
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._head: bytes | None = b""
        self._rows = _rows(purpose, format, self.limits)
        self._spool = tempfile.TemporaryFile(dir=scratch) if format == "parquet" else None  # noqa: SIM115

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; they may be cut anywhere.

        Raises:
            DataError: file_too_large past a limit, wrong_format for a file that is not what it is called: stop
                reading then.
        """
        self._bytes += len(piece)
        check_size(self._bytes, self.limits.max_bytes)
        self._digest.update(piece)
        if self._head is not None:
            self._head += piece
            if len(self._head) < _HEAD_BYTES:
                return
            piece = self._recognised()
        self._pass_on(piece)

    def finish(self) -> FileSummary:
        """Take what is left, and give the result. Call once. Raises as `feed` does."""
        if self._head is not None:
            self._pass_on(self._recognised())
        if self._spool is not None:
            from seuf_core.data.parquet import parquet_rows

            with self._spool as spool:
                self._take(parquet_rows(spool, self._records.purpose, self.limits))
        elif self._rows is not None and not self._records.stopped:
            self._take(self._rows.finish())
        summary = self._records.finish()
        if self.format == "jsonl":
            return summary
        digest = self._digest.hexdigest()
        return replace(summary, format=self.format, sent_bytes=self._bytes, sent_sha256=digest)

    def close(self) -> None:
        """Let go of a Parquet file that was not finished."""
        if self._spool is not None:
            self._spool.close()

    def _recognised(self) -> bytes:
        head, self._head = self._head or b"", None
        if (problem := contradiction(head[:_HEAD_BYTES], self.format)) is not None:
            raise problem
        return head

    def _pass_on(self, piece: bytes) -> None:
        if self._spool is not None:
            self._spool.write(piece)
        elif self._rows is not None:
            if not self._records.stopped:
                self._take(self._rows.feed(piece))
        else:
            self._records.feed(piece)
            if self._out is not None:
                self._out.write(piece)

    def _take(self, rows: Iterable[Row]) -> None:
        for at, row in rows:
            if self._records.stopped:
                return
            if isinstance(row, LineProblem):
                self._records.refuse(row, at)
                continue
            line = json.dumps(row, ensure_ascii=False).encode()
            self._records.row(line, at)
            if self._out is not None:
                self._out.write(line + b"\n")


def check_size(size: int, limit: int | None) -> None:
    """Raises DataError (file_too_large) when `size` bytes are over the limit."""
    if limit is not None and size > limit:
        raise DataError(
            "file_too_large", f"The file has more than {limit} bytes.", "Split it, or raise the limit."
        )


def check_format(purpose: Purpose, format: Format) -> None:  # noqa: A002
    """Raises DataError (text_without_choices) for an evaluation set as plain text."""
    if format == "text" and purpose == "evaluation":
        raise DataError(
            "text_without_choices",
            "An evaluation set needs questions with choices, which plain text has not.",
            "Send it as JSON Lines, CSV or Parquet.",
        )


def _rows(purpose: Purpose, format: Format, limits: Limits) -> CsvRows | TextRows | None:  # noqa: A002
    if format == "csv":
        return CsvRows(purpose, limits)
    return TextRows(limits) if format == "text" else None


def _short(name: str) -> bytes:
    """A name at a fixed size, so that a hundred thousand long ones need no more memory than short ones."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def read_examples(path: Path, limits: Limits | None = None) -> list[Example]:
    """The examples of a forget or retain file, in file order. Its extension says its format (formats.format_of).

    Raises:
        DataError: set_not_found, wrong_format, file_too_large, or invalid_set with the first errors and their lines.
    """
    return [record for record in _read(path, "forget", limits or Limits()) if isinstance(record, Example)]


def read_probes(path: Path, limits: Limits | None = None) -> list[Probe]:
    """The probes of an evaluation file, in file order. Raises as read_examples does."""
    return [record for record in _read(path, "evaluation", limits or Limits()) if isinstance(record, Probe)]


def _read(path: Path, purpose: Purpose, limits: Limits) -> list[Record]:
    if not path.is_file():
        raise DataError(
            "set_not_found",
            f"{path} is not a file.",
            "Give the path of a JSON Lines, CSV, Parquet or text file.",
        )
    records: list[Record] = []
    reader = SetReader(purpose, format_of(path.name), limits, on_record=records.append)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(READ_BYTES):
                reader.feed(piece)
        summary = reader.finish()
    except DataError as error:
        raise DataError(error.code, f"{path.name}: {error.message}", error.fix) from None
    finally:
        reader.close()
    if not summary.ok:
        raise invalid_set(path.name, summary)
    return records


def invalid_set(name: str, summary: FileSummary) -> DataError:
    """The error for a file that broke rules: its first three errors, and the count of all."""
    first = " ".join(
        f"{summary.place(error).capitalize()}: {error.message}" if error.line else error.message
        for error in summary.errors[:3]
    )
    count = summary.error_count
    return DataError(
        "invalid_set",
        f"{name} has {count} error{'s' if count > 1 else ''}. {first}",
        "Correct the lines and try again.",
    )
