"""(d) An upload beside a plain copy of the file, and downloads beside nginx serving the same file; all on loopback.

An upload is parsed line by line, hashed and written to the disk before it is answered; the copy is written to the disk
too. Downloads are read by one lean client, from the page cache, in turn with nginx (sendfile). Four downloads of a
quarter each run at once; what arrives is hashed and compared.

Figures: transfer/upload/<ours|copy>, transfer/download/<ours|nginx> and transfer/ranges/<ours|nginx> in bytes a
second, .../ratio, and transfer/memory/<before|during>.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Final
from urllib.parse import urlsplit

from benchmarks.chaos import parts
from benchmarks.chaos.keeper import Program
from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, memory, stage
from benchmarks.service.wire import Wire
from seuf_core.checkpoint.manifest import MANIFEST, BaseRef, ChangedTensor, FileEntry, Manifest, sha256_file
from store import leases
from store.artefacts import Artefacts
from store.checkpoints import artefact_key
from store.fenced import FencedJob
from store.ids import new_id

PIECE: Final = 1 << 20
RANGES: Final = 4
NAME: Final = "model.safetensors"


def run(options: Options, figures: Figures, folder: Path) -> None:
    """Uploads, then downloads."""
    with stage(folder / "transfer", "sqlite", MAX_UPLOAD_BYTES=str(128 << 20)) as service:
        _uploads(options, figures, service)
        path, size = _publish(service, options.bytes)
        stored = service.folder / "data" / "artefacts" / artefact_key(path.split("/")[2]) / NAME
        nginx = _nginx(service, stored.parent)
        ways = {"ours": (service.url, path, service.headers), "nginx": (nginx, f"/{NAME}", {})}
        wanted = sha256_file(stored)
        quarters = [_span(size, number) for number in range(RANGES)]
        for url, at, headers in ways.values():
            assert _fetch(url, at, headers, None, hashed=True) == wanted  # and now it is in the page cache
        api = service.keeper.programs["api"]
        figures.add("transfer/memory/before", memory(api), "bytes")
        whole: dict[str, list[float]] = {way: [] for way in ways}
        ranges: dict[str, list[float]] = {way: [] for way in ways}
        most = 0
        for _ in range(options.repeats):
            for way, (url, at, headers) in ways.items():
                began = time.perf_counter()
                _fetch(url, at, headers, None)
                whole[way].append(size / (time.perf_counter() - began))
                began = time.perf_counter()
                with ThreadPoolExecutor(RANGES) as pool:
                    running = [pool.submit(_fetch, url, at, headers, span) for span in quarters]
                    while not all(one.done() for one in running):
                        most = max(most, memory(api))
                        time.sleep(0.02)
                    [one.result() for one in running]
                ranges[way].append(size / (time.perf_counter() - began))
        _check_ranges(service, path, stored, quarters)
        figures.add("transfer/memory/during", most, "bytes")
        for part, values in {"download": whole, "ranges": ranges}.items():
            for way in ways:
                figures.add(f"transfer/{part}/{way}", median(values[way]), "bytes/s")
            ratio = median(a / b for a, b in zip(values["ours"], values["nginx"], strict=True))
            figures.add(f"transfer/{part}/ratio", ratio, "ratio")


def _uploads(options: Options, figures: Figures, service: Stage) -> None:
    source = service.folder / "upload.jsonl"
    # A paragraph a line: a set has at most 100,000 lines.
    line = b'{"text": "' + b"Ada Quill has lived at 12 Elm Road since 1971. " * 20 + b'"}\n'
    source.write_bytes(line * (options.upload_bytes // len(line)))
    size, ours, copies = source.stat().st_size, [], []
    with service.client() as client:
        for _ in range(options.repeats):
            began = time.perf_counter()
            file = client.upload(source, "forget")
            ours.append(size / (time.perf_counter() - began))
            assert file["sha256"] == sha256_file(source)
            began = time.perf_counter()
            copy = service.folder / "copy"
            with source.open("rb") as read, copy.open("wb") as write:
                shutil.copyfileobj(read, write, PIECE)
                write.flush()
                os.fsync(write.fileno())
            copies.append(size / (time.perf_counter() - began))
    figures.add("transfer/upload/ours", median(ours), "bytes/s")
    figures.add("transfer/upload/copy", median(copies), "bytes/s")
    figures.add("transfer/upload/ratio", median(a / b for a, b in zip(ours, copies, strict=True)), "ratio")


def _publish(service: Stage, size: int) -> tuple[str, int]:
    """A checkpoint of one large file, published as a worker does; the path of its download."""
    wire, database = Wire(service.url, service.headers), service.database()
    job_id = wire.post("/jobs", prepare(service)).json()["id"]
    with database.write() as session:
        claim = leases.claim(session, job_id, "benchmark", 600)
    assert claim is not None
    job, out = FencedJob(database, job_id, claim.token), service.folder / "out"
    out.mkdir()
    block = os.urandom(PIECE)
    with (out / NAME).open("wb") as file:
        for _ in range(size // PIECE):
            file.write(block)
    entry = FileEntry(name=NAME, bytes=(out / NAME).stat().st_size, sha256=sha256_file(out / NAME))
    manifest = Manifest(
        created_by="benchmark",
        base=BaseRef(digest="sha256:" + "0" * 64, model_type="olmoe"),
        files=(entry,),
        changed=(ChangedTensor(tensor="w", shard=NAME, bytes=4),),
        parameters_changed=1,
        parameters_total=100,
    )
    (out / MANIFEST).write_text(manifest.to_json())
    checkpoint = new_id("ckpt")
    Artefacts(service.environment["SEUF_DATA_DIR"] + "/artefacts").put_folder(out, artefact_key(checkpoint))
    with job.together():
        job.publish_checkpoint(checkpoint, entry.bytes, manifest.model_dump(mode="json"))
        job.succeed()
    wire.close()
    database.dispose()
    return f"/checkpoints/{checkpoint}/files/{NAME}", entry.bytes


def _nginx(service: Stage, folder: Path) -> str:
    """nginx on the folder of the checkpoint, as it comes: sendfile, no logs."""
    binary = shutil.which("nginx")
    assert binary is not None, "This part needs nginx. Install it: apt-get install nginx-light"
    port, home = parts.free_port(), service.folder / "nginx"
    home.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in kinds)
    (home / "nginx.conf").write_text(
        f"daemon off; pid {home}/pid; error_log {home}/error.log; worker_processes 1; user root;"
        f" events {{}} http {{ access_log off; sendfile on; tcp_nopush on; {paths}"
        f" server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    service.keeper.run(Program("nginx", [binary, "-c", f"{home}/nginx.conf"], os.environ, service.folder))
    url = f"http://127.0.0.1:{port}"
    parts.wait_for(lambda: _open(url), "nginx")
    return url


def _open(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((str(address.hostname), int(address.port or 0))) == 0


def _span(size: int, number: int) -> tuple[int, int]:
    """First and last byte of a quarter."""
    return number * size // RANGES, (number + 1) * size // RANGES - 1


def _fetch(
    url: str, path: str, headers: Mapping[str, str], span: tuple[int, int] | None, *, hashed: bool = False
) -> str:
    """Read a body to its end and drop it; its sha256 if asked for."""
    address = urlsplit(url)
    asked = {**headers, **({"Range": f"bytes={span[0]}-{span[1]}"} if span else {})}
    lines = [f"GET {path} HTTP/1.1", f"Host: {address.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in asked.items()]
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 60) as wire:
        wire.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += wire.recv(4096)
        start, _, rest = head.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in start.split(b"\r\n")[1:])
        assert start.split()[1] == (b"206" if span else b"200"), start
        left = int(fields[b"content-length"]) - len(rest)
        digest.update(rest)
        while left > 0:
            got = wire.recv_into(piece, min(PIECE, left))
            assert got, "the body ended early"
            left -= got
            if hashed:
                digest.update(piece[:got])
    return digest.hexdigest()


def _check_ranges(service: Stage, path: str, stored: Path, quarters: list[tuple[int, int]]) -> None:
    for span in quarters:
        with stored.open("rb") as file:
            file.seek(span[0])
            digest = hashlib.sha256()
            left = span[1] - span[0] + 1
            while left:
                piece = file.read(min(PIECE, left))
                digest.update(piece)
                left -= len(piece)
        assert _fetch(service.url, path, service.headers, span, hashed=True) == digest.hexdigest()
