"""(a) POST /jobs and GET /jobs/{id} beside the bare endpoint: latency of one client, and the rate of eight.

Ours looks up a key, binds the query to a tenant, and answers with a validated job; a POST writes job, event, outbox
message and audit row in one transaction. The bare one (benchmarks.service.bare) does one insert or one select. Both
are one uvicorn process each on the same database, and take turns of a tenth of a second or so.

Figures: latency/<postgres|sqlite>/<get|unchanged|post>/<ours|bare>/<p50|p95|p99|rate>, and .../ratio, the median over
repeats of p99 of ours over p99 of the bare one; `unchanged` is a GET with the ETag of what is there: 304.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import KINDS, Stage, stage
from benchmarks.service.wire import Wire, percentiles

BLOCKS: Final = 10
CLIENTS: Final = 8
Ask = Callable[[Wire], None]


def run(options: Options, figures: Figures, folder: Path) -> None:
    """Measure both databases."""
    for kind in KINDS:
        with stage(folder / kind, kind) as service:
            bare_url = service.database_url.replace("/seuf.db", "/bare.db")  # Postgres: a table beside ours
            _, bare = service.serve("bare", "benchmarks.service.bare:app", BARE_DATABASE_URL=bare_url)
            _measure(options, figures, f"latency/{kind}", service, bare)


def _measure(options: Options, figures: Figures, prefix: str, service: Stage, bare_url: str) -> None:
    ours, bare = Wire(service.url, service.headers), Wire(bare_url)
    wires = {"ours": ours, "bare": bare}
    for what, asks in _asks(service, ours, bare).items():
        repeats: dict[str, list[dict[str, float]]] = {way: [] for way in asks}
        for _ in range(options.repeats):
            for way, values in _latencies(wires, asks, options).items():
                repeats[way].append(percentiles(values))
        for way, cuts in repeats.items():
            for cut in ("p50", "p95", "p99"):
                figures.add(f"{prefix}/{what}/{way}/{cut}", median(one[cut] for one in cuts), "s")
            rate = median(_rate(wires[way], asks[way], options.seconds) for _ in range(options.repeats))
            figures.add(f"{prefix}/{what}/{way}/rate", rate, "1/s")
        for cut in ("p50", "p99"):
            ratio = median(one[cut] / other[cut] for one, other in zip(repeats["ours"], repeats["bare"], strict=True))
            figures.add(f"{prefix}/{what}/ratio_{cut}", ratio, "ratio")
    for wire in wires.values():
        wire.close()


def _asks(service: Stage, ours: Wire, bare: Wire) -> dict[str, dict[str, Ask]]:
    """What is asked of each, checked once for what it answers and after that for its status."""
    body = prepare(service)
    job = ours.post("/jobs", body)
    assert job.status == 202, job.body
    document = job.json()
    thing = bare.post("/things", {"document": document})
    assert thing.status == 202
    assert len(thing.body) > len(job.body)  # the bare one answers with as much
    here, there = f"/jobs/{document['id']}", f"/things/{thing.json()['id']}"
    shown = ours.ask("GET", here)
    assert shown.json() == document
    etag = shown.headers["ETag"]
    assert bare.ask("GET", there).json()["document"] == document
    get_bare = partial(_ask, method="GET", path=there, expected=200)
    return {
        "get": {"ours": partial(_ask, method="GET", path=here, expected=200), "bare": get_bare},
        "unchanged": {
            "ours": partial(_ask, method="GET", path=here, expected=304, headers={"If-None-Match": etag}),
            "bare": get_bare,
        },
        "post": {
            "ours": partial(_post, path="/jobs", content=body),
            "bare": partial(_post, path="/things", content={"document": document}),
        },
    }


def _ask(wire: Wire, *, method: str, path: str, expected: int, headers: dict[str, str] | None = None) -> None:
    answer = wire.ask(method, path, **(headers or {}))
    assert answer.status == expected, answer.body


def _post(wire: Wire, *, path: str, content: dict[str, Any]) -> None:
    answer = wire.post(path, content)
    assert answer.status == 202, answer.body


def _latencies(wires: dict[str, Wire], asks: dict[str, Ask], options: Options) -> dict[str, list[float]]:
    """Seconds of every request, in blocks that alternate, so that both see what else the machine does."""
    seconds: dict[str, list[float]] = {way: [] for way in asks}
    for block in range(BLOCKS + 1):
        for way, ask in asks.items():
            for _ in range(options.requests // BLOCKS):
                began = time.perf_counter()
                ask(wires[way])
                if block:  # the first one warms up
                    seconds[way].append(time.perf_counter() - began)
    return seconds


def _rate(wire: Wire, ask: Ask, seconds: float) -> float:
    """Requests a second of CLIENTS at once."""
    end = time.monotonic() + seconds

    def client(_: int) -> int:
        own, done = Wire(wire.url, wire.headers), 0
        while time.monotonic() < end:
            ask(own)
            done += 1
        own.close()
        return done

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = sum(pool.map(client, range(CLIENTS)))
    return done / (time.monotonic() - began)
