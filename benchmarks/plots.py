"""Two kinds of picture as SVG in plain Python: bars of factors, and lines over doubled sizes; both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from seuf_core.attribution.heatmap import FONT, INK, MUTED

COLOURS: Final = ("#1b7f79", "#d1602f", "#4a5fb5", "#8a6d1f", "#8f3f7a", "#5b6675")
GRID: Final = "#e3e5e8"
WIDTH: Final = 780
LEFT: Final = 310  # px of the bars' labels
ROW: Final = 22
TOP: Final = 44
PANEL: Final = 220  # px of a line plot's side


def bars_svg(title: str, values: Mapping[str, float], unit: str = "x") -> str:
    """A horizontal bar a value, from 1 on a logarithmic axis, with the value written at its end."""
    highest = max([10.0, *values.values()])
    scale = (WIDTH - LEFT - 70) / math.log10(highest)
    height = TOP + ROW * len(values) + 30
    lines = _opening(title, WIDTH, height)
    for power in range(math.floor(math.log10(highest)) + 1):
        x = LEFT + power * scale
        lines.append(f'<path d="M{x:.1f} {TOP - 6}V{height - 24}" stroke="{GRID}"/>')
        lines.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{10**power:g}{unit}</text>')
    for number, (label, value) in enumerate(values.items()):
        y, width = TOP + number * ROW, max(1.0, math.log10(max(1.0, value)) * scale)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{COLOURS[0]}"/>')
        lines.append(
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 13}" fill="{INK}">{_short(value)}{unit}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def lines_svg(title: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """A panel a name; in it each series of (size, value), drawn relative to its first value: slope = exponent."""
    width = len(panels) * (PANEL + 40) + 40
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    height = TOP + PANEL + 40 + ROW * math.ceil(len(series) / 4)
    lines = _opening(title, width, height)
    factors = [v / line[0][1] for panel in panels.values() for line in panel.values() for _, v in line]
    low, high = math.log2(min([0.5, *factors])), math.log2(max([2.0, *factors]))
    for number, (name, panel) in enumerate(panels.items()):
        lines += _panel(40 + number * (PANEL + 40), name, panel, series, low, high)
    for number, name in enumerate(series):
        x, y = 40 + (number % 4) * (width - 80) / 4, TOP + PANEL + 52 + ROW * (number // 4)
        lines.append(f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{_colour(number)}"/>')
        lines.append(f'<text x="{x + 15:.1f}" y="{y}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _panel(
    left: float,
    name: str,
    panel: Mapping[str, Sequence[tuple[float, float]]],
    series: Sequence[str],
    low: float,
    high: float,
) -> list[str]:
    sizes = sorted({size for line in panel.values() for size, _ in line})
    span = math.log2(sizes[-1] / sizes[0]) if len(sizes) > 1 else 1.0

    def x_of(size: float) -> float:
        return left + math.log2(size / sizes[0]) / span * PANEL

    def y_of(factor: float) -> float:
        return TOP + PANEL - (math.log2(factor) - low) / (high - low) * PANEL

    lines = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = y_of(2.0**power)
        lines.append(f'<path d="M{left} {y:.1f}h{PANEL}" stroke="{GRID}"/>')
        lines.append(
            f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{2.0**power:g}x</text>'
        )
    for size in sizes:
        place = f'x="{x_of(size):.1f}" y="{TOP + PANEL + 15}"'
        lines.append(f'<text {place} text-anchor="middle" font-size="10">{size:g}</text>')
    lines.append(
        f'<text x="{left + PANEL / 2}" y="{TOP + PANEL + 31}" text-anchor="middle">{escape(name)}</text>'
    )
    for label, line in panel.items():
        points = [f"{x_of(size):.1f} {y_of(value / line[0][1]):.1f}" for size, value in line]
        colour = _colour(series.index(label))
        lines.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return lines


def _opening(title: str, width: float, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}" {FONT} font-size="12" fill="{MUTED}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
