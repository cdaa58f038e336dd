"""Turns, peaks and exponents are what they say."""

from __future__ import annotations

import os
import time

import pytest
import torch

from benchmarks.measure import PeakMemory, Variant, exponent, in_process, interleaved


def test_variants_take_turns_and_the_median_is_of_one_call() -> None:
    order: list[str] = []

    def quick() -> None:
        order.append("quick")
        time.sleep(0.02)

    def slow() -> None:
        order.append("slow")
        time.sleep(0.35)

    medians = interleaved({"quick": Variant(quick), "slow": Variant(slow)}, rounds=2)
    assert medians["quick"] == pytest.approx(0.02, rel=0.3)
    assert medians["slow"] == pytest.approx(0.35, rel=0.1)
    turns = [name for name, after in zip(order, [*order[1:], ""], strict=True) if name != after]
    assert turns == ["quick", "slow"] * 2
    assert order.count("quick") > 20
    assert order.count("slow") == 2


@pytest.mark.parametrize(("limit", "taken"), [(0.0, 2), (0.19, 3), (10.0, 5)])
def test_long_turns_are_fewer_rounds(limit: float, taken: int) -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(limit)
        time.sleep(0.05)

    interleaved({"it": Variant(call)}, 5, turn=0.0, limit=limit)
    assert len(calls) == taken


def test_the_peak_is_seen_after_it_is_over() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        block = torch.ones(25_000_000)  # 100 MB
        time.sleep(0.1)
        del block
    assert 95e6 < peak.anonymous - before.anonymous < 120e6
    assert peak.resident >= peak.anonymous


def test_a_process_of_its_own() -> None:
    assert in_process(os.getpid) != os.getpid()


def test_the_exponent_of_a_power_is_found() -> None:
    assert exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)
    assert exponent([1, 2, 4], [5.0, 5.0, 5.0]) == pytest.approx(0.0, abs=1e-9)
