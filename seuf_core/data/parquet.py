"""Parquet as rows, read by a process of its own.

A few kilobytes of Parquet can say that they are gigabytes, in their footer or, without a word there, in a page; and
the reader is C++ code that parses what a stranger sent. So seuf_core.data.parquet_child reads it, with a bound on
its memory and its time: whatever the file does to it, the caller gets rows or a problem.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import BinaryIO, Final

from seuf_core.data.lines import LineProblem
from seuf_core.data.records import Limits, Purpose
from seuf_core.data.rows import Row

MEMORY_BYTES = 1 << 30  # of data: the interpreter, pyarrow and what the file needs
# One thread and no pools that are kept: the bound on memory then means what the file needs.
_PLAIN: Final = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
# Escapes make a text up to six times as long as JSON.
_ESCAPED: Final = 6


def parquet_rows(file: BinaryIO, purpose: Purpose, limits: Limits) -> Iterator[Row]:
    """(row, fields) for each row from 1, or (row, LineProblem); row 0 is the file as a whole.

    Args:
        file: a real file (it has a descriptor), whole and flushed by this call.
    """
    file.flush()
    file.seek(0)
    command = [sys.executable, "-m", "seuf_core.data.parquet_child", purpose]
    command += [json.dumps(asdict(limits)), str(MEMORY_BYTES)]
    longest = limits.max_line_bytes * _ESCAPED + 65536
    child = subprocess.Popen(  # noqa: S603  (our own module)
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **_PLAIN}
    )
    assert child.stdout is not None
    with child:
        try:
            while (line := child.stdout.readline(longest)).endswith(
                b"\n"
            ):  # half a line: killed while it wrote
                at, said = json.loads(line)
                yield at, LineProblem(*said) if isinstance(said, list) else said
            if child.wait() != 0:
                yield 0, _too_much()
        finally:
            child.kill()


def _too_much() -> LineProblem:
    return LineProblem(
        "parquet_too_costly",
        "Reading the Parquet file takes more memory or time than is allowed, or it is broken: write it anew with "
        "smaller pages, or send JSON Lines.",
    )
