"""What a job really read, held and took, phase by phase: the plan's other half. Torch-free; memory and bytes on Linux.

Memory is anonymous memory of the process (RssAnon): mapped files, which the kernel drops when it likes, are not in it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from seuf_core.plan.planner import Phase, Plan

SAMPLE_SECONDS = 0.02


@dataclass
class Measured:
    """One phase as it went.

    cpu_seconds: of all threads; on a machine that has other work it says what the phase would have taken alone.
    bytes_read, bytes_written: through system calls, from the page cache too. from_disk: of these, what was fetched from
    storage. peak_bytes: of anonymous memory, looked at every 20 ms. device_bytes: the most that was allocated on an
    accelerator; None on a CPU.
    """

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_read: int = 0
    from_disk: int = 0
    bytes_written: int = 0
    peak_bytes: int = 0
    device_bytes: int | None = None


@dataclass(frozen=True)
class Actual:
    """What a job did."""

    phases: tuple[Measured, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the phase that held most."""
        return max((phase.peak_bytes for phase in self.phases), default=0)

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, totals included."""
        totals = {"peak_bytes": self.peak_bytes, "seconds": round(self.seconds, 3)}
        for name in ("bytes_read", "from_disk", "bytes_written"):
            totals[name] = sum(getattr(phase, name) for phase in self.phases)
        return {"phases": [asdict(phase) for phase in self.phases], **totals}


class Recorder:
    """Records a job: one phase after the other, from `phase` to `phase`, until the block ends.

    Costs one thread that reads /proc/self/status every 20 ms.

    Args:
        device_peak: gives the bytes that were most on the accelerator since it was last called.
    """

    def __init__(self, device_peak: Callable[[], int] | None = None) -> None:
        self._device_peak = device_peak
        self._done: list[Measured] = []
        self._now: Measured | None = None
        self._began: tuple[float, float, dict[str, int]] = (0.0, 0.0, {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="seuf-recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._stop.set()
        self._thread.join()

    def phase(self, name: str) -> None:
        """The phase before ends, and this one begins; one that comes again is a phase of its own.

        What the phase before freed goes back to the kernel first, so that the memory of each is its own.
        """
        self._close()
        give_back()
        self._began = time.monotonic(), time.process_time(), io_counters()
        self._now = Measured(name, peak_bytes=anonymous_bytes())

    @property
    def actual(self) -> Actual:
        """The phases that have ended."""
        return Actual(tuple(self._done))

    def _close(self) -> None:
        phase, self._now = self._now, None
        if phase is None:
            return
        since, cpu, before = self._began
        after = io_counters()
        phase.seconds = round(time.monotonic() - since, 3)
        phase.cpu_seconds = round(time.process_time() - cpu, 3)
        phase.bytes_read = after.get("rchar", 0) - before.get("rchar", 0)
        phase.from_disk = after.get("read_bytes", 0) - before.get("read_bytes", 0)
        phase.bytes_written = after.get("wchar", 0) - before.get("wchar", 0)
        phase.peak_bytes = max(phase.peak_bytes, anonymous_bytes())
        phase.device_bytes = self._device_peak() if self._device_peak else None
        self._done.append(phase)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            phase = self._now
            if phase is not None:
                phase.peak_bytes = max(phase.peak_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0")
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Let the C library return what it keeps of freed memory; where it is not glibc, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def io_counters() -> dict[str, int]:
    """What this process read and wrote so far: /proc/self/io, {} where there is none."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(":") for line in text.splitlines())}


@dataclass(frozen=True)
class Comparison:
    """A plan beside what happened: actual over planned, of memory, seconds and bytes; None where one is not known.

    phases: rows {phase, planned_ and actual_ peak, seconds, read, written} of phases that both have. What the plan
    calls `constants` belongs to `unlearning` where nobody recorded it apart.
    """

    memory: float | None
    seconds: float | None
    bytes_read: float | None
    bytes_written: float | None
    phases: tuple[dict[str, Any], ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def compare(plan: Plan, actual: Actual) -> Comparison:
    """What became of a plan. Seconds and bytes are of the phases that were planned."""
    measured = {phase.name for phase in actual.phases}
    rows: list[dict[str, Any]] = []
    for name, parts in _by_measured(plan, measured).items():
        went = [phase for phase in actual.phases if phase.name == name]
        known = [part.seconds for part in parts if part.seconds is not None]
        rows.append(
            {
                "phase": name,
                "planned_peak": max(part.peak_bytes for part in parts),
                "actual_peak": max(phase.peak_bytes for phase in went),
                "planned_seconds": round(sum(known), 3) if len(known) == len(parts) else None,
                "actual_seconds": round(sum(phase.seconds for phase in went), 3),
                "cpu_seconds": round(sum(phase.cpu_seconds for phase in went), 3),
                "planned_read": sum(part.bytes_read for part in parts),
                "actual_read": sum(phase.bytes_read for phase in went),
                "planned_written": sum(part.bytes_written for part in parts),
                "actual_written": sum(phase.bytes_written for phase in went),
            }
        )
    planned = [row["planned_seconds"] for row in rows]
    seconds = None if None in planned else _ratio(_total(rows, "actual_seconds"), sum(planned))
    peaks = [max((row[f"{which}_peak"] for row in rows), default=0) for which in ("actual", "planned")]
    return Comparison(
        memory=_ratio(*peaks),
        seconds=seconds,
        bytes_read=_ratio(_total(rows, "actual_read"), _total(rows, "planned_read")),
        bytes_written=_ratio(_total(rows, "actual_written"), _total(rows, "planned_written")),
        phases=tuple(rows),
    )


def _by_measured(plan: Plan, measured: set[str]) -> dict[str, list[Phase]]:
    """Phases of the plan under the names that were recorded."""
    found: dict[str, list[Phase]] = {}
    for phase in plan.phases:
        name = "unlearning" if phase.name == "constants" and "constants" not in measured else phase.name
        if name in measured:
            found.setdefault(name, []).append(phase)
    return found


def _total(rows: list[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows))


def _ratio(actual: float, planned: float | None) -> float | None:
    return round(actual / planned, 4) if planned else None
