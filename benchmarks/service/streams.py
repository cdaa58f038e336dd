"""(b) Many watchers of one running job on one API process: all get all events, in order; how late, and for how much.

An event's lag is from its commit to the moment a watcher has read it. All watchers are one Python process beside the
server on the same machine, so the lag holds what that takes to read them.

Figures: streams/<watchers|events|messages> as counts, streams/lag/<p50|p95|max>, streams/memory/<before|during>, and
streams/per_watcher.
"""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from benchmarks.figures import Figures
from benchmarks.service.options import Options
from benchmarks.service.sets import prepare
from benchmarks.service.stage import Stage, memory, stage
from benchmarks.service.wire import Wire, percentiles
from store import leases
from store.fenced import FencedJob

EVENTS: Final = 30
PAUSE_SECONDS: Final = 0.2
END_SECONDS: Final = 60.0
Seen = list[tuple[int, float]]
"""Number of an event, and when it was read."""


def run(options: Options, figures: Figures, folder: Path) -> None:
    """Measure on Postgres."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a socket a watcher, in the server too
    with stage(folder / "streams", "postgres") as service:
        wire = Wire(service.url, service.headers)
        job_id = wire.post("/jobs", prepare(service)).json()["id"]
        wire.close()
        api = service.keeper.programs["api"]
        before = memory(api)
        written, seen, during = asyncio.run(_watched(service, job_id, options.watchers))
        last = len(written)
        for one in seen:
            assert [number for number, _ in one] == list(range(1, last + 1)), "a watcher missed an event"
        lags = [at - written[number] for one in seen for number, at in one if number > 2]
        figures.add("streams/watchers", len(seen), "watchers")
        figures.add("streams/events", last, "events")
        figures.add("streams/messages", sum(map(len, seen)), "messages")
        cut = percentiles(lags)
        for name, value in {"p50": cut["p50"], "p95": cut["p95"], "max": max(lags)}.items():
            figures.add(f"streams/lag/{name}", value, "s")
        figures.add("streams/memory/before", before, "bytes")
        figures.add("streams/memory/during", during, "bytes")
        figures.add("streams/per_watcher", (during - before) / len(seen), "bytes")


async def _watched(service: Stage, job_id: str, watchers: int) -> tuple[dict[int, float], list[Seen], int]:
    """Open every stream, run the job, and wait for all of them to end; also the memory with all of them open."""
    opened = [asyncio.Event() for _ in range(watchers)]
    reading = [asyncio.create_task(_watch(service, job_id, event)) for event in opened]
    async with asyncio.timeout(END_SECONDS):
        await asyncio.gather(*(event.wait() for event in opened))
    written = await asyncio.to_thread(_run, service, job_id)
    during = memory(service.keeper.programs["api"])
    async with asyncio.timeout(END_SECONDS):
        return written, await asyncio.gather(*reading), during


async def _watch(service: Stage, job_id: str, opened: asyncio.Event) -> Seen:
    """One stream, from its first event to its end."""
    address = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    lines = [
        f"GET /jobs/{job_id}/events HTTP/1.1",
        f"Host: {address.netloc}",
        "Accept: text/event-stream",
        "Connection: close",
        *(f"{name}: {value}" for name, value in service.headers.items()),
    ]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    seen: Seen = []
    assert b" 200 " in await reader.readline()
    while line := await reader.readline():
        if line.startswith(b"id: "):
            seen.append((int(line[4:]), time.monotonic()))
            opened.set()
    writer.close()
    return seen


def _run(service: Stage, job_id: str) -> dict[int, float]:
    """Run the job as a worker does; when each event was committed."""
    database = service.database()
    with database.write() as session:
        claim = leases.claim(session, job_id, "benchmark", 600)
    assert claim is not None
    job, written = FencedJob(database, job_id, claim.token), {1: 0.0, 2: 0.0}
    for step in range(EVENTS):
        time.sleep(PAUSE_SECONDS)
        job.step(step, 0.5, None, {"step": step, "loss": 0.5})
        written[len(written) + 1] = time.monotonic()
    job.fail("benchmark", "It has served its purpose.", None)
    written[len(written) + 1] = time.monotonic()
    database.dispose()
    return written
