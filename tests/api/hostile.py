"""Hostile bytes for tests/api/test_hostile_uploads.py: contents of files, and the API as a process of its own.

A content is (name of the file, bytes, the code it must be refused with, None where it is harmless).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import func, select

from store.database import Database
from store.keys import Keys
from store.tables import File, Upload, UploadPart
from tests.services import free_port, wait_until

SECRET = "the secret of the hostile tests, long enough for anybody"
MIB = 1 << 20
LIMITS = {  # small, so that what is over them is cheap to make
    "SEUF_MAX_UPLOAD_BYTES": 8 * MIB,
    "SEUF_MAX_FILE_BYTES": 12 * MIB,
    "SEUF_UPLOAD_PART_BYTES": 4 * MIB,
    "SEUF_SLOW_BODY_SECONDS": 1,
    "SEUF_REQUESTS_PER_MINUTE": 0,
}
GOOD = b'{"text": "fine"}\n'

Content = tuple[str, bytes, str | None]


def parquet(compression: str = "zstd", **columns: object) -> bytes:
    """A Parquet file of these columns."""
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression=compression)
    return out.getvalue()


def _zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\0" * (20 * MIB))
    return out.getvalue()


def _shared(size: int, rows: int) -> bytes:
    """A text of `size` that all rows share: kilobytes that say size * rows."""
    return parquet(text=pa.array(["x" * size]).dictionary_encode().take(pa.array([0] * rows)))


def _torn(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


_PARQUET = parquet(text=["a", "b"])
_FOOTER = len(_PARQUET) - 8 - int.from_bytes(_PARQUET[-8:-4], "little")
INVALID = "invalid_examples"
CONTENTS: dict[str, Content] = {
    "zip bomb": ("a.zip", _zip("a.jsonl"), "wrong_format"),
    "zip bomb called jsonl": ("a.jsonl", _zip("../../etc/passwd"), "wrong_format"),
    "workbook called csv": ("a.csv", _zip("xl/workbook.xml"), "wrong_format"),
    "gzip bomb": ("a.jsonl.gz", gzip.compress(b"\0" * (50 * MIB)), "wrong_format"),
    "gzip bomb called parquet": ("a.parquet", gzip.compress(GOOD), "wrong_format"),
    "zlib stream": ("a.jsonl", zlib.compress(b"\0" * MIB), INVALID),
    "parquet that shares a megabyte 50,000 times": (
        "a.parquet",
        _shared(1_000_000, 50_000),
        "file_too_large",
    ),
    "parquet that shares a text over the line": ("a.parquet", _shared(2 * MIB, 100), INVALID),
    "parquet of one huge page": ("a.parquet", parquet(text=["x" * (11 * MIB)]), INVALID),
    "parquet over the size": ("a.parquet", parquet(text=["x" * MIB] * 13), "file_too_large"),
    "parquet of too many rows": ("a.parquet", _shared(1, 100_001), INVALID),
    "parquet of many columns": ("a.parquet", parquet(**{f"c{n}": ["x"] for n in range(2000)}), INVALID),
    "parquet without columns": ("a.parquet", parquet(), INVALID),
    "parquet without rows": ("a.parquet", parquet(text=pa.array([], pa.string())), INVALID),
    "parquet of numbers": ("a.parquet", parquet(text=[1.5]), INVALID),
    "parquet of nested lists": ("a.parquet", parquet(text=[[[["a"]]]]), INVALID),
    "parquet of structs": ("a.parquet", parquet(text=[{"a": 1}]), INVALID),
    "parquet of not UTF-8": (
        "a.parquet",
        parquet(
            text=pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
        ),
        INVALID,
    ),
    "parquet cut off": ("a.parquet", _PARQUET[:-9], INVALID),
    "parquet of its magic alone": ("a.parquet", b"PAR1PAR1", INVALID),
    "parquet whose footer is 4 GB": ("a.parquet", b"PAR1" + b"\xff\xff\xff\xffPAR1", INVALID),
    "parquet whose footer is negative": ("a.parquet", b"PAR1xxxx\x00\x00\x00\x80PAR1", INVALID),
    "parquet with a broken page": ("a.parquet", _torn(_PARQUET, 6, b"\xff" * 12), INVALID),
    "parquet with a broken footer": ("a.parquet", _torn(_PARQUET, _FOOTER, b"\xff" * 20), INVALID),
    "encrypted parquet": ("a.parquet", b"PARE" + _PARQUET[4:-4] + b"PARE", "wrong_format"),
    "parquet called jsonl": ("a.jsonl", _PARQUET, "wrong_format"),
    "parquet called txt": ("a.txt", _PARQUET, "wrong_format"),
    "polyglot of parquet and jsonl": ("a.jsonl", _PARQUET[:4] + b"\n" + GOOD + _PARQUET, "wrong_format"),
    "polyglot of pdf and jsonl": ("a.jsonl", b"%PDF-1.7\n" + GOOD, "wrong_format"),
    "polyglot of jsonl and zip": ("a.jsonl", GOOD + _zip("x"), INVALID),
    "polyglot of csv and jsonl": ("a.csv", b'{"text": "a"},prompt\n', "wrong_format"),
    "HTML": ("a.jsonl", b"<script>alert(1)</script>", INVALID),
    "a pickle": ("a.jsonl", b"\x80\x04cos\nsystem\n(S'id'\ntR.", INVALID),
    "jsonl called txt": ("a.txt", GOOD, "wrong_format"),
    "csv called txt": ("a.txt", b"prompt,completion\na,b\n", "wrong_format"),
    "a JSON array": ("a.json", b'[{"text": "a"}]', INVALID),
    "deep JSON": ("a.jsonl", b"[" * 100_000, INVALID),
    "deep objects": ("a.jsonl", b'{"a":' * 20_000 + b"1" + b"}" * 20_000, INVALID),
    "deep JSON in a field": ("a.jsonl", b'{"text": ' + b"[" * 9 + b"]" * 9 + b"}", INVALID),
    "a duplicate key": ("a.jsonl", b'{"text": "a", "text": "b"}', INVALID),
    "a duplicate key by an escape": ("a.jsonl", b'{"text": "a", "t\\u0065xt": "b"}', INVALID),
    "NaN": ("a.jsonl", b'{"text": NaN}', INVALID),
    "Infinity": ("a.jsonl", b'{"text": -Infinity}', INVALID),
    "a huge integer": ("a.jsonl", b'{"text": ' + b"9" * 500_000 + b"}", INVALID),
    "a huge exponent": ("a.jsonl", b'{"text": 1e999999999}', INVALID),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', INVALID),
    "two wrong halves": ("a.jsonl", b'{"text": "\\udc00\\ud800"}', INVALID),
    "a surrogate in UTF-8": ("a.jsonl", b'{"text": "\xed\xa0\x80"}', INVALID),
    "overlong UTF-8": ("a.jsonl", b'{"text": "\xc0\xaf"}', INVALID),
    "bad UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}', INVALID),
    "UTF-8 cut in the middle": ("a.jsonl", b'{"text": "\xe2\x82', INVALID),
    "a NUL": ("a.jsonl", b'{"text": "a\0b"}', INVALID),
    "a NUL in a name": ("a.jsonl", b'{"text": "a", "id": "\\u0000"}', INVALID),
    "an escape in a name": ("a.jsonl", b'{"text": "a", "domain": "\\u001b[31m"}', INVALID),
    "a mark before JSON": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, INVALID),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "wrong_format"),
    "UTF-16 without a mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), INVALID),
    "UTF-32": ("a.txt", GOOD.decode().encode("utf-32-be"), INVALID),
    "nothing": ("a.jsonl", b"\n", INVALID),
    "only blanks": ("a.jsonl", b" \t\r\n" * 100_000, INVALID),
    "a million blank lines": ("a.jsonl", b"\n" * 1_000_001, INVALID),
    "a million blank lines of text": ("a.txt", b"\n" * 1_000_001, INVALID),
    "a million blank lines of CSV": ("a.csv", b"text\n" + b"\n" * 1_000_001, INVALID),
    "a million broken lines": ("a.jsonl", b"{\n" * 1_000_000, INVALID),
    "too many examples": ("a.txt", b"a\n" * 100_001, INVALID),
    "a line over the limit": ("a.jsonl", b'{"text": "' + b"x" * (2 * MIB) + b'"}', INVALID),
    "a line over the limit as text": ("a.txt", b"x" * (2 * MIB), INVALID),
    "text of NULs": ("a.txt", b"\0" * MIB, INVALID),
    "a prototype": ("a.jsonl", b'{"__proto__": {"text": "a"}}', INVALID),
    "a long key": ("a.jsonl", b'{"' + b"k" * 500_000 + b'": 1}', INVALID),
    "CSV of a million columns": ("a.csv", b"," * 1_000_000, INVALID),
    "CSV of ten million columns": ("a.csv", b"," * (7 * MIB), INVALID),
    "CSV whose rows have a million cells": ("a.csv", b"text\n" + b"," * 1_000_000 + b"\n", INVALID),
    "CSV with a quote that never closes": ("a.csv", b'text\n"' + b"a\n" * (3 * MIB), INVALID),
    "CSV of quotes": ("a.csv", b'text\n"' + b'""' * 400_000 + b'"x\n', INVALID),
    "CSV with semicolons": ("a.csv", b"prompt;completion\na;b\n", INVALID),
    "CSV with a NUL": ("a.csv", b"text\na\0b\n", INVALID),
    "CSV of lone returns": ("a.csv", b"text\ra\rb\r", INVALID),
    "CSV whose list is a bomb": ("a.csv", b"prompt,completion,id\na,b," + b"x" * 300 + b"\n", INVALID),
    "a formula": ("a.csv", b"text,id\n=cmd|' /C calc'!A0,\x07\n", INVALID),
}


def mutations(number: int) -> Iterator[bytes]:
    """Seeded damage to good files of every format: bits flipped, pieces cut, doubled and swapped."""
    chance = random.Random(20261124)
    good = [GOOD * 5, b'prompt,completion\n"a ""b""",c\nd,"e\nf"\n' * 3, _PARQUET]
    for _ in range(number):
        content = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 4)):
            at, to = sorted((chance.randrange(len(content)), chance.randrange(len(content))))
            match chance.randrange(4):
                case 0:
                    content[at] ^= 1 << chance.randrange(8)
                case 1 if to - at < len(content) - 8:
                    del content[at:to]
                case 2:
                    content[at:at] = content[at:to]
                case _:
                    content[at:to] = chance.randbytes(to - at)
        yield bytes(content)


def deep(levels: int) -> bytes:
    """JSON that nests."""
    return b"[" * levels + b"]" * levels


JSON_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"\x00\x01\x02",
    "deep": deep(200_000),
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep in metadata": b'{"model": "m", "metadata": {"a": ' + deep(900) + b"}}",
    "deep in an example": b'{"model": "m", "forget_set": {"examples": [{"text": ' + deep(900) + b"}]}}",
    "a huge integer": b'{"model": ' + b"9" * 100_000 + b"}",
    "a huge integer in the method": b'{"model": "m", "method": {"steps": ' + b"9" * 4000 + b"}}",
    "NaN": b'{"model": "m", "method": {"learning_rate": NaN}}',
    "Infinity": b'{"bytes": Infinity, "purpose": "forget", "filename": "a"}',
    "a duplicate key": b'{"model": "a", "model": "b"}',
    "half a surrogate pair": b'{"model": "\\ud800", "name": "\\ud800", "filename": "\\ud800"}',
    "a NUL": b'{"model": "a\\u0000", "name": "\\u0000", "filename": "\\u0000"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "bad UTF-8": b'{"model": "\xff"}',
    "a mark": b'\xef\xbb\xbf{"model": "a"}',
    "a million examples": b'{"model": "m", "forget_set": {"examples": [' + b"{}," * 1_000_000 + b"{}]}}",
    "a million keys": b"{" + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}",
    "over the limit": b'{"model": "' + b"x" * (4 * MIB) + b'"}',
    "a huge key": b'{"' + b"k" * (3 * MIB) + b'": 1}',
    "a huge key in metadata": b'{"model": "m", "metadata": {"' + b"k" * (3 * MIB) + b'": "v"}}',
    "a million wrong examples": b'{"model": "m", "forget_set": {"examples": [' + b"1," * 1_000_000 + b"1]}}",
    "a million wrong fields of the method": b'{"model": "m", "method": {'
    + b",".join(b'"%d":1' % n for n in range(250_000))
    + b"}}",
    "a list": b"[]",
    "null": b"null",
    "a prototype": b'{"__proto__": {"model": "a"}, "constructor": 1}',
    "an unknown format": b'{"model": "m", "forget_set": {"content": "a", "format": "parquet"}}',
    "a path as content": b'{"model": "m", "forget_set": {"file": "../../etc/passwd"}}',
}
JSON_ROUTES = ("/jobs", "/jobs/estimate", "/uploads", "/models")

NAMES = (
    "../../../../etc/passwd",
    "..\\..\\windows\\system32\\config",
    "/etc/shadow",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\x",
    "CON",
    "NUL.jsonl",
    "aux.txt.jsonl",
    "/dev/zero",
    "/proc/self/environ",
    "file:///etc/passwd",
    ".",
    "..",
    "~root/.ssh/id_rsa",
    "a\x00b.jsonl",
    "a\r\nX-Injected: 1",
    "\u202egnp.lsonj",
    "x" * 5000 + ".jsonl",
    "%2e%2e%2fetc%2fpasswd",
    "${HOME}; rm -rf /",
    "<img src=x onerror=alert(1)>.jsonl",
)


@dataclass(frozen=True)
class Besieged:
    """The API as a process of its own, with what it keeps."""

    url: str
    pid: int
    data: Path
    database: Database
    http: httpx.Client
    log: Path

    def memory(self, what: str) -> int:
        """VmRSS or VmHWM of the process, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"the API has ended; see {self.log}")

    def forget_peak(self) -> None:
        """Begin a new peak (VmHWM)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def clear(self) -> None:
        """Take away what a case that failed has left, so that only that one fails."""
        for kind in ("files", "uploads"):
            for one in self.http.get(f"/{kind}", params={"limit": 100}).json()["data"]:
                self.http.delete(f"/{kind}/{one['id']}")

    def kept(self) -> dict[str, object]:
        """Everything that a request has left behind; empty when there is nothing."""
        folders = [self.data / "uploads", *(self.data / "artefacts").iterdir()]
        left: dict[str, object] = {
            str(folder): names
            for folder in folders
            if folder.exists() and (names := [path.name for path in folder.iterdir()])
        }
        with self.database.read() as session:
            counts = {
                "files": select(func.count()).select_from(File).where(File.deleted_at.is_(None)),
                "uploads": select(func.count()).select_from(Upload),
                "parts": select(func.count()).select_from(UploadPart),
            }
            left |= {name: number for name, query in counts.items() if (number := session.scalar(query))}
        return left


@contextmanager
def besieged(template: Path, data: Path) -> Iterator[Besieged]:
    """Start the API on a migrated SQLite database in `data`."""
    (data / "seuf.db").write_bytes(template.read_bytes())
    database, port, log = Database(f"sqlite:///{data / 'seuf.db'}"), free_port(), data / "log"
    with database.write() as session:
        key = Keys(session, "hostile").create("test", SECRET.encode()).token
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SEUF_")}
    settings = {name: str(value) for name, value in LIMITS.items()}
    environment = {**clean, **settings, "SEUF_DATA_DIR": str(data), "SEUF_SECRET": SECRET}
    command = [sys.executable, "-m", "uvicorn", "api.main:app", "--port", str(port), "--no-access-log"]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: _answers(url), 20, f"the API; see {log}")
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
                yield Besieged(url, process.pid, data, database, http, log)
        finally:
            process.kill()
            database.dispose()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def as_json(text: str) -> bytes:
    """A JSON string."""
    return json.dumps(text).encode()
