"""The formats of a set: their names, how a file says which it has, and how one is caught that says it wrongly."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Final, Literal

from seuf_core.errors import DataError

Format = Literal["jsonl", "csv", "parquet", "text"]

_BY_EXTENSION: Final[dict[str, Format]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
}
_BY_MEDIA_TYPE: Final[dict[str, Format]] = {
    "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl",
    "application/json": "jsonl",
    "text/csv": "csv",
    "application/vnd.apache.parquet": "parquet",
    "text/plain": "text",
}
_CALLED: Final[dict[Format, str]] = {
    "jsonl": "JSON Lines",
    "csv": "CSV",
    "parquet": "Parquet",
    "text": "plain text",
}
# How other things begin that people send by mistake. None of these can begin a text.
_FOREIGN: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"\x1f\x8b", "gzip", "Unpack it first: gunzip."),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "Unpack it first: unzstd."),
    (b"BZh", "bzip2", "Unpack it first: bunzip2."),
    (b"\xfd7zXZ\x00", "xz", "Unpack it first: unxz."),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", "Unpack it, or save the sheet as CSV UTF-8."),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "Save the sheet as CSV UTF-8."),
    (b"%PDF-", "a PDF", "Save its text as plain text."),
    (b"PARE", "encrypted Parquet", "Write it without encryption."),
    (b"\xff\xfe", "UTF-16 text", "Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Save it as UTF-8."),
)
_COLUMNS: Final = frozenset(
    [
        "id",
        "fact",
        "domain",
        "prompt",
        "completion",
        "text",
        "question",
        "answer",
        "alternative",
        "choices",
        "set",
    ]
)


def format_of(name: str, media_type: str = "") -> Format:
    """The format that a file's name says, or else its media type (of a Content-Type); JSON Lines if neither does."""
    by_name = _BY_EXTENSION.get(PurePath(name).suffix.lower())
    return by_name or _BY_MEDIA_TYPE.get(media_type.partition(";")[0].strip().lower(), "jsonl")


def contradiction(head: bytes, said: Format) -> DataError | None:
    """The error of a file whose first bytes say plainly that it is not `said`; None when they do not say so."""
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            return _wrong(f"The file is {what}, not {_CALLED[said]}.", fix)
    seen = _recognised(head)
    if seen is not None and seen != said:
        fix = f"Rename it to end in {_extension(seen)}, or send `format` as {seen}."
        return _wrong(f"The file is {_CALLED[seen]}, but it is called {_CALLED[said]}.", fix)
    if said == "parquet" and head and seen is None:
        fix = "Rename it to end in .jsonl, .csv or .txt if that is what it is."
        return _wrong("The file is called Parquet, but does not begin as a Parquet file does.", fix)
    return None


def _recognised(head: bytes) -> Format | None:
    """Only what cannot well be anything else."""
    if head.startswith(b"PAR1"):
        return "parquet"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if re.match(rb'\{\s*"', first):
        return "jsonl"
    columns = first.partition(b"\n")[0].strip().replace(b'"', b"").split(b",")
    if len(columns) > 1 and all(column.decode("latin-1").strip() in _COLUMNS for column in columns):
        return "csv"
    return None


def _extension(format: Format) -> str:  # noqa: A002  (what it is called everywhere)
    return next(extension for extension, named in _BY_EXTENSION.items() if named == format)


def _wrong(message: str, fix: str) -> DataError:
    return DataError("wrong_format", message, fix)
