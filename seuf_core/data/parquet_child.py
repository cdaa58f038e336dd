"""The process that reads a Parquet file for seuf_core.data.parquet: `python -m seuf_core.data.parquet_child`.

Standard input is the file itself. Standard output is a line of JSON a row: [row, {fields}], or
[row, [code, message, field]] for a problem, row 0 for the whole file. What the footer says is checked before a page
is read; what it does not say meets the bounds of the process.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from seuf_core.data.lines import LineProblem
from seuf_core.data.records import Limits, Purpose, fields_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

CPU_SECONDS: Final = 300
ROWS_AT_ONCE: Final = 64
FOOTER_STRINGS: Final = 16 << 20
FOOTER_ENTRIES: Final = 100_000


def main() -> None:
    """Bound this process, then read."""
    memory = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    purpose, limits = cast("Purpose", sys.argv[1]), Limits(**json.loads(sys.argv[2]))
    with open(0, "rb", closefd=False) as source:
        for at, said in _rows(source, purpose, limits):
            sys.stdout.write(json.dumps([at, said]) + "\n")


def _rows(source: BinaryIO, purpose: Purpose, limits: Limits) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    at = 0
    try:
        file = _opened(source, purpose, limits)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
            for index in range(batch.num_rows):
                at += 1
                yield at, _fields(batch, index, limits)
    except LineProblem as problem:
        yield 0, _said(problem)
    except (MemoryError, pa.ArrowMemoryError):
        raise SystemExit(1) from None  # the caller says what that means
    except (pa.ArrowException, OSError, ValueError):
        where = f" (after row {at})" if at else ""
        broken = LineProblem("broken_parquet", f"The file cannot be read as Parquet{where}: write it anew.")
        yield 0, _said(broken)


def _opened(source: BinaryIO, purpose: Purpose, limits: Limits) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    footer = pq.ParquetFile(
        source, thrift_string_size_limit=FOOTER_STRINGS, thrift_container_size_limit=FOOTER_ENTRIES
    )
    _check_sizes(footer.metadata, limits)
    _check_columns(footer.schema_arrow, purpose)
    # A text that many rows share stays one text.
    texts = [column.name for column in footer.schema_arrow if _is_text(column.type)]
    return pq.ParquetFile(
        source, metadata=footer.metadata, read_dictionary=texts, pre_buffer=False, buffer_size=1 << 20
    )


def _check_sizes(footer: pq.FileMetaData, limits: Limits) -> None:
    if footer.num_rows > limits.max_examples:
        message = f"The file has {footer.num_rows} rows, more than {limits.max_examples}: split it."
        raise LineProblem("too_many_examples", message)
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    if sum(group.num_rows for group in groups) != footer.num_rows:
        raise LineProblem(
            "broken_parquet", "The footer contradicts itself about its rows: write the file anew."
        )
    size = sum(group.total_byte_size for group in groups)
    if limits.max_stored_bytes is not None and size > limits.max_stored_bytes:
        message = f"Unpacked, the file has {size} bytes, more than {limits.max_stored_bytes}: split it."
        raise LineProblem("file_too_large", message)


def _check_columns(schema: pa.Schema, purpose: Purpose) -> None:
    import pyarrow as pa

    known = fields_of(purpose)
    for column in schema:
        name = column.name[:40]
        if name.startswith("__index_level_"):
            message = "Column '__index_level_0__' is pandas' index: write with to_parquet(..., index=False)."
            raise LineProblem("unknown_column", message)
        if name not in known:
            raise LineProblem("unknown_column", f"Column {name!r} is not known: use {', '.join(known)}.")
        if schema.names.count(name) > 1:
            raise LineProblem("duplicate_column", f"Column {name!r} stands twice: keep one.", name)
        kind = column.type
        if name == "choices":
            wanted, fits = "a list of strings", pa.types.is_list(kind) and _is_text(kind.value_type)
        elif name == "answer" and purpose == "evaluation":
            wanted, fits = "an integer", pa.types.is_integer(kind)
        else:
            wanted, fits = "a string", _is_text(kind)
        if not fits and not pa.types.is_null(kind):
            raise LineProblem("wrong_type", f"Column {name!r} must be {wanted}; it is {kind}."[:200], name)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _fields(batch: pa.RecordBatch, index: int, limits: Limits) -> Any:
    """The fields of a row that are not null, or its problem."""
    fields: dict[str, Any] = {}
    size = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[index].as_py()
        except UnicodeDecodeError:
            return _said(LineProblem("not_utf8", f"Column {name!r} is not UTF-8.", name))
        if value is None:
            continue
        size += sum(len(part or "") for part in value) if isinstance(value, list) else len(str(value))
        if size > limits.max_line_bytes:
            message = f"The row has more than {limits.max_line_bytes} bytes: split the text."
            return _said(LineProblem("line_too_long", message, name))
        fields[name] = value
    return fields


def _said(problem: LineProblem) -> list[str | None]:
    return [problem.code, problem.message, problem.field]


if __name__ == "__main__":
    main()
