"""How a figure is written on a page; one that was not measured is an empty cell."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """Seconds without their unit: three digits below 1, else one."""
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def size(value: float | None) -> str:
    """Bytes in GB or MB (powers of ten)."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def times(value: float | None) -> str:
    """A ratio, "8.6x" or "124x"."""
    return "" if value is None else f"{value:.0f}x" if value >= 10 else f"{value:.1f}x"


def share(value: float | None) -> str:
    """A share of 1."""
    return "" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A small share in percent."""
    return "" if value is None else f"{value:.3%}"
