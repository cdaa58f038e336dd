"""How much memory a job may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from seuf_core.errors import MethodError
from seuf_core.plan import machine as machines
from seuf_core.plan.machine import MEMORY_VARIABLE, machine, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("123", 123), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "6 pounds", "-1GB", "0GB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(MethodError, match="no size of memory") as error:
        parse_size(text)
    assert error.value.code == "not_a_size"


def test_what_is_given_wins_then_the_environment_then_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_VARIABLE, "2GB")
    assert machine("1GB").memory == 10**9
    assert machine().memory == 2 * 10**9
    monkeypatch.delenv(MEMORY_VARIABLE)
    free = machine()
    assert free.memory > 0
    assert free.limit.startswith("90% of what")


def test_a_control_group_leaves_its_limit_less_what_is_used(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 500000\n")
    assert machines._left_in_group(tmp_path) == 600_000  # page cache gives way
    (tmp_path / "memory.max").write_text("max\n")
    assert machines._left_in_group(tmp_path) is None
