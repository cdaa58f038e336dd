"""What a recorder sees of real memory and real files, and a plan beside it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from seuf_core.plan.measure import Actual, Measured, Recorder, anonymous_bytes, compare
from seuf_core.plan.planner import make_plan
from seuf_core.plan.setting import Targets
from tests.plan.made import UNIT, shape, tokens, with_memory
from tests.plan.test_planner import NPO

SIZE = 200 << 20


def test_a_peak_is_seen_although_it_is_gone_at_the_end() -> None:
    with Recorder() as recorder:
        recorder.phase("small")
        recorder.phase("large")
        before = anonymous_bytes()
        held = torch.ones(SIZE, dtype=torch.uint8)
        time.sleep(0.2)
        del held
        recorder.phase("small again")
    small, large, again = recorder.actual.phases
    assert large.peak_bytes - before >= SIZE
    assert small.peak_bytes < before + SIZE / 2
    assert again.peak_bytes < before + SIZE / 2
    assert recorder.actual.peak_bytes == large.peak_bytes


def test_bytes_are_counted_in_their_phase(tmp_path: Path) -> None:
    with Recorder() as recorder:
        recorder.phase("writing")
        (tmp_path / "file").write_bytes(bytes(5 << 20))
        recorder.phase("reading")
        (tmp_path / "file").read_bytes()
    writing, reading = recorder.actual.phases
    # The thread that looks reads a few kB itself.
    assert 5 << 20 <= writing.bytes_written < 6 << 20
    assert 5 << 20 <= reading.bytes_read < 6 << 20
    assert writing.bytes_read < 1 << 20
    assert reading.bytes_written < 1 << 20


def test_seconds_are_those_of_the_phase() -> None:
    with Recorder() as recorder:
        recorder.phase("short")
        recorder.phase("long")
        time.sleep(0.1)
    short, long = recorder.actual.phases
    assert short.seconds < 0.1 <= long.seconds
    assert recorder.actual.as_dict()["seconds"] == pytest.approx(short.seconds + long.seconds)


def test_the_accelerator_is_asked_once_a_phase() -> None:
    peaks = iter([5, 7])
    with Recorder(lambda: next(peaks)) as recorder:
        recorder.phase("one")
        recorder.phase("two")
    assert [phase.device_bytes for phase in recorder.actual.phases] == [5, 7]


def test_a_plan_beside_what_happened() -> None:
    plan = make_plan(shape(), tokens(), NPO, with_memory(10**12), calibration=UNIT, targets=Targets((2,), 1))
    planned = {phase.name: phase for phase in plan.phases}
    went = [
        Measured("validating", 99.0, peak_bytes=10**12),  # not planned, not compared
        *(
            Measured(name, 2 * (planned[name].seconds or 0), peak_bytes=plan.peak_bytes // 2)
            for name in ("attributing", "unlearning", "evaluating", "publishing")
        ),
    ]
    went[2].seconds += 2 * (planned["constants"].seconds or 0)
    found = compare(plan, Actual(tuple(went)))
    assert found.seconds == pytest.approx(2)
    assert found.memory == pytest.approx(0.5, abs=1e-3)
    by_name = {row["phase"]: row for row in found.phases}
    assert "constants" not in by_name  # nobody recorded it apart
    both = (planned["constants"].seconds or 0) + (planned["unlearning"].seconds or 0)
    assert by_name["unlearning"]["planned_seconds"] == pytest.approx(both)
