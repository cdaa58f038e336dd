"""The score matrix as a picture: layer x expert, the selected experts outlined (torch-free, SVG in plain Python).

Colours are interpolated in Oklab (https://bottosson.github.io/posts/oklab/) between stops that lie equally far
apart there, so that equal steps of the score look like equal steps. The picture carries no script, style sheet,
font or id: it can be inlined any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

Lab = tuple[float, float, float]

# (lightness, green to red, blue to yellow). Lightness falls evenly in both scales, so they survive greyscale.
SEQUENTIAL: Final[tuple[Lab, ...]] = (
    (0.975, -0.012, 0.030),
    (0.842, -0.072, 0.048),
    (0.709, -0.095, -0.012),
    (0.576, -0.060, -0.078),
    (0.443, -0.008, -0.112),
    (0.310, 0.022, -0.098),
)
DIVERGING: Final[tuple[Lab, ...]] = (
    (0.380, -0.020, -0.115),
    (0.675, -0.045, -0.082),
    (0.970, 0.000, 0.004),
    (0.675, 0.092, 0.078),
    (0.380, 0.105, 0.070),
)

INK: Final = "#1d2430"
MUTED: Final = "#5b6675"
NOT_A_NUMBER: Final = "#e3e5e8"
FONT: Final = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"

WIDTH: Final = 1024  # of the cells, at most; px
LARGEST_CELL: Final = 40
SMALLEST_CELL: Final = 6
LEFT, TOP, BOTTOM, RIGHT = 58, 58, 52, 120  # px around the cells; the colour bar is on the right
NARROWEST: Final = 480  # px of the whole picture: room for a title
SHORTEST_BAR: Final = 120  # px of the colour bar and what is around it
CHARACTER: Final = 10.5  # px of a title's character in the widest of the fonts


@dataclass(frozen=True)
class _Scale:
    """From a score to a colour; `low` and `high` are the ends of the colour bar."""

    low: float
    high: float
    stops: tuple[Lab, ...]

    def colour(self, value: float) -> str:
        """`#rrggbb` of a number, the middle of the scale where all scores are equal."""
        span = self.high - self.low
        return _hex(_between(self.stops, (value - self.low) / span if span > 0 else 0.5))


def attribution_svg(attribution: Mapping[str, Any]) -> str:
    """The picture of an attribution as `Attributed.as_dict` and `GET /jobs/{id}/attribution` give it."""
    selected = {(one["layer"], one["expert"]) for one in attribution["selection"]}
    title = f"Experts by {attribution['score']}"
    return heatmap_svg(attribution["matrix"], attribution["layers"], selected, title)


def heatmap_svg(
    scores: Sequence[Sequence[float | None]],
    layers: Sequence[int],
    selected: Collection[tuple[int, int]],
    title: str,
) -> str:
    """A self-contained, accessible SVG of a score.

    The scale diverges around 0 where a score has both signs (contrast) and runs from the lowest to the highest
    score where it has not. Each cell says its layer, expert and score when it is pointed at.

    Args:
        scores: [L, E]; None, NaN and infinities are crossed out.
        layers: decoder layer index of each row.
        selected: (decoder layer index, expert) of the targets.
        title: any text; what does not fit the picture's width is cut there and whole in its tooltip.

    Raises:
        ValueError: no scores, rows of unlike lengths, or a target that is not among the cells.
    """
    experts = len(scores[0]) if scores else 0
    if not experts or len(scores) != len(layers) or any(len(row) != experts for row in scores):
        raise ValueError("scores must be a matrix with one row for each of layers")
    title = "".join(char if char.isprintable() else " " for char in title)  # XML has no control characters
    cell = max(SMALLEST_CELL, min(LARGEST_CELL, WIDTH // experts))
    width, height = experts * cell, len(layers) * cell
    matrix = [[math.nan if value is None else value for value in row] for row in scores]
    scale = _scale_of([value for row in matrix for value in row if math.isfinite(value)])
    rows = {layer: row for row, layer in enumerate(layers)}
    outlined = sorted((rows.get(layer, -1), expert) for layer, expert in selected)
    if any(row < 0 or not 0 <= expert < experts for row, expert in outlined):
        raise ValueError("selected must name cells of scores")
    full = (max(LEFT + width + RIGHT, NARROWEST), TOP + max(height, SHORTEST_BAR) + BOTTOM)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full[0]} {full[1]}" width="{full[0]}" '
            f'height="{full[1]}" role="img" aria-label="{escape(title)}" {FONT} font-size="12" fill="{MUTED}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(_description(matrix, layers, outlined))}</desc>",
            f'<rect width="{full[0]}" height="{full[1]}" fill="#ffffff"/>',
            *_heading(title, len(outlined), full[0]),
            f'<g transform="translate({LEFT} {TOP})">',
            *_cells(matrix, layers, scale, cell),
            *_axes(layers, experts, cell),
            *_outlines(outlined, cell),
            *_colour_bar(scale, width + 24, max(height, SHORTEST_BAR)),
            "</g>",
            "</svg>",
            "",
        ]
    )


def _scale_of(numbers: Sequence[float]) -> _Scale:
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)
    if low < 0 < high:
        bound = max(-low, high)
        return _Scale(-bound, bound, DIVERGING)
    return _Scale(low, high, SEQUENTIAL)


def _heading(title: str, count: int, width: int) -> list[str]:
    most = int((width - LEFT) / CHARACTER)
    shown = title if len(title) <= most else f"{title[: most - 1]}…"
    lines = [
        f'<text x="{LEFT}" y="25" font-size="16" font-weight="600" fill="{INK}">{escape(shown)}'
        f"<title>{escape(title)}</title></text>"
    ]
    if count:
        noun = "expert" if count == 1 else "experts"
        lines += [
            *_outline(LEFT + 3, 37, 8),
            f'<text x="{LEFT + 19}" y="45">{count} selected {noun}</text>',
        ]
    return lines


def _cells(matrix: Sequence[Sequence[float]], layers: Sequence[int], scale: _Scale, cell: int) -> list[str]:
    side = cell - _gap(cell)
    drawn = []
    for row, (layer, values) in enumerate(zip(layers, matrix, strict=True)):
        drawn.append(f'<g transform="translate(0 {row * cell})">')
        for expert, value in enumerate(values):
            number = math.isfinite(value)
            fill, said = (scale.colour(value), _format(value)) if number else (NOT_A_NUMBER, "not a number")
            x = expert * cell
            drawn.append(
                f'<rect x="{x}" width="{side}" height="{side}" fill="{fill}">'
                f"<title>layer {layer}, expert {expert}: {said}</title></rect>"
            )
            if not number:
                drawn.append(
                    f'<path d="M{x} 0l{side} {side}m0 {-side}l{-side} {side}" stroke="{MUTED}" '
                    'pointer-events="none"/>'
                )
        drawn.append("</g>")
    return drawn


def _gap(cell: int) -> int:
    """Pixels between two cells."""
    return 1 if cell < 16 else 2


def _axes(layers: Sequence[int], experts: int, cell: int) -> list[str]:
    width, height, middle = experts * cell, len(layers) * cell, cell / 2 - 1
    drawn = [
        f'<text x="-8" y="{row * cell + middle + 4:g}" text-anchor="end">{layers[row]}</text>'
        for row in range(0, len(layers), _step(cell, 15))
    ]
    drawn += [
        f'<text x="{expert * cell + middle:g}" y="{height + 16}" text-anchor="middle">{expert}</text>'
        for expert in range(0, experts, _step(cell, 26))
    ]
    return [
        *drawn,
        f'<text x="{width / 2:g}" y="{height + 38}" text-anchor="middle" fill="{INK}">expert</text>',
        f'<text transform="translate(-40 {height / 2:g}) rotate(-90)" text-anchor="middle" fill="{INK}">layer</text>',
    ]


def _step(cell: int, room: int) -> int:
    """Every how many-th cell has a label, so that a label has `room` px: 1, 2, 4, 8, ..."""
    return int(2 ** math.ceil(math.log2(max(1.0, room / cell))))


def _outlines(outlined: Sequence[tuple[int, int]], cell: int) -> list[str]:
    side = cell - _gap(cell)
    return [line for row, expert in outlined for line in _outline(expert * cell, row * cell, side)]


def _outline(x: int, y: int, side: int) -> list[str]:
    """Around a cell, not over it; dark within light, so that it shows beside every colour of both scales."""
    box = f'x="{x - 2}" y="{y - 2}" width="{side + 4}" height="{side + 4}" rx="2" fill="none" pointer-events="none"'
    return [
        f'<rect {box} stroke="#ffffff" stroke-width="4"/>',
        f'<rect {box} stroke="{INK}" stroke-width="2"/>',
    ]


def _colour_bar(scale: _Scale, x: int, height: int) -> list[str]:
    top, length, steps = 6, min(height - 12, 240), 48
    values = [scale.high + (scale.low - scale.high) * (step + 0.5) / steps for step in range(steps)]
    bands = [
        # A little taller than a step: no seams between them.
        f'<rect x="{x}" y="{top + step * length / steps:.2f}" width="14" height="{length / steps + 0.5:.2f}" '
        f'fill="{scale.colour(value)}"/>'
        for step, value in enumerate(values)
    ]
    marks = {0.0: scale.high, 0.5: (scale.high + scale.low) / 2, 1.0: scale.low}
    if scale.low == scale.high:
        marks = {0.5: scale.high}
    return bands + [
        f'<text x="{x + 20}" y="{top + place * length + 4:g}">{_format(value)}</text>'
        for place, value in marks.items()
    ]


def _description(
    matrix: Sequence[Sequence[float]], layers: Sequence[int], outlined: Sequence[tuple[int, int]]
) -> str:
    """What a reader who does not see the picture needs: its size, the highest score, the selected experts."""
    cells = [
        (value, layers[row], expert)
        for row, values in enumerate(matrix)
        for expert, value in enumerate(values)
        if math.isfinite(value)
    ]
    text = f"Scores of {len(matrix[0])} experts in each of {len(layers)} layers."
    if cells:
        value, layer, expert = max(cells, key=lambda c: c[0])
        text += f" Highest: layer {layer}, expert {expert}, {_format(value)}."
    chosen = "; ".join(f"layer {layers[row]}, expert {expert}" for row, expert in outlined)
    return f"{text} Selected: {chosen or 'none'}."


def _format(value: float) -> str:
    return f"{value + 0.0:.3g}".replace("-", "\N{MINUS SIGN}")  # + 0.0: no minus before a zero


def _between(stops: Sequence[Lab], place: float) -> Lab:
    """The colour at `place` in [0, 1] of evenly spaced stops."""
    at = min(max(place, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(at), len(stops) - 2)
    lightness, a, b = (
        x + (y - x) * (at - first) for x, y in zip(stops[first], stops[first + 1], strict=True)
    )
    return lightness, a, b


def _hex(lab: Lab) -> str:
    """Oklab to `#rrggbb`; what sRGB cannot show is clipped."""
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(max(c, 0.0), 1.0))):02x}" for c in linear)


def _gamma(linear: float) -> float:
    """Linear light to sRGB, both in [0, 1]."""
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
