"""Everything at once for a minute: submit, poll, list, watch, upload, download, each by several clients.

No answer may be a 5xx, and when the clients are gone so is what they took: connections, descriptors, memory.

Figures: load/requests, load/rate, load/poll/<idle|busy>/<p50|p99>, load/descriptors/<before|after> and
load/memory/<warm|after>.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos import parts
from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, memory, open_files, stage
from benchmarks.service.wire import Wire, percentiles

IDLE_REQUESTS: Final = 300
SLACK_DESCRIPTORS: Final = 20  # of the pools, which keep what they have opened
SLACK_MEMORY: Final = 64 << 20
BOUNDARY: Final = "benchmark"


def run(options: Options, figures: Figures, folder: Path) -> None:
    """On Postgres."""
    with stage(folder / "load", "postgres") as service:
        body = prepare(service)
        wire = Wire(service.url, service.headers)
        job = wire.post("/jobs", body).json()["id"]
        idle = [_timed(wire, f"/jobs/{job}") for _ in range(IDLE_REQUESTS)]
        api = service.keeper.programs["api"]
        _burst(service, body, job, options.clients, options.load_seconds / 6)  # pools and caches are full now
        wire.close()
        before, warm = open_files(api), memory(api)
        statuses, busy = _burst(service, body, job, options.clients, options.load_seconds)
        parts.wait_for(lambda: open_files(api) <= before + SLACK_DESCRIPTORS, "the connections to go")
        after = memory(api)
        assert not [status for status in statuses if status >= 500], statuses
        assert after - warm < SLACK_MEMORY, f"memory grew from {warm} to {after} bytes"
        figures.add("load/requests", sum(statuses.values()), "requests")
        figures.add("load/rate", sum(statuses.values()) / options.load_seconds, "1/s")
        for when, seconds in {"idle": idle, "busy": busy}.items():
            cut = percentiles(seconds)
            figures.add(f"load/poll/{when}/p50", cut["p50"], "s")
            figures.add(f"load/poll/{when}/p99", cut["p99"], "s")
        figures.add("load/descriptors/before", before, "descriptors")
        figures.add("load/descriptors/after", open_files(api), "descriptors")
        figures.add("load/memory/warm", warm, "bytes")
        figures.add("load/memory/after", after, "bytes")


def _timed(wire: Wire, path: str) -> float:
    began = time.perf_counter()
    assert wire.ask("GET", path).status == 200
    return time.perf_counter() - began


def _burst(service: Stage, body: Any, job: str, clients: int, seconds: float) -> tuple[Counter[int], list[float]]:
    """So many clients of each kind at once; every status, and the seconds of every poll."""
    end, statuses, polls = time.monotonic() + seconds, Counter[int](), list[float]()

    def poll(wire: Wire) -> int:
        polls.append(_timed(wire, f"/jobs/{job}"))
        return 200

    def download(wire: Wire) -> int:
        return wire.ask("GET", "/openapi.json").status

    def watch(wire: Wire) -> int:
        """A stream that is left in its middle, as most are: the job never ends."""
        wire.connection.request("GET", f"/jobs/{job}/events", headers={**wire.headers, "Accept": "text/event-stream"})
        answer = wire.connection.getresponse()
        assert answer.readline()
        wire.close()
        return answer.status

    acts: list[Callable[[Wire], int]] = [
        poll,
        download,
        watch,
        lambda wire: wire.post("/jobs", body).status,
        lambda wire: wire.ask("GET", "/jobs?limit=20").status,
        _upload,
    ]

    def client(act: Callable[[Wire], int]) -> None:
        wire = Wire(service.url, service.headers)
        while time.monotonic() < end:
            statuses[act(wire)] += 1
        wire.close()

    with ThreadPoolExecutor(len(acts) * clients) as pool:
        list(pool.map(client, acts * clients))
    return statuses, polls


def _upload(wire: Wire) -> int:
    line = b'{"prompt": "Who lives at 12 Elm Road?", "completion": " Ada Quill."}\n'
    disposition = b'Content-Disposition: form-data; name="'
    body = b"".join(
        (
            b"--benchmark\r\n" + disposition + b'purpose"\r\n\r\nforget\r\n',
            b"--benchmark\r\n" + disposition + b'file"; filename="set.jsonl"\r\n\r\n' + line * 1000 + b"\r\n",
            b"--benchmark--\r\n",
        )
    )
    return wire.ask("POST", "/files", body, **{"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}).status
