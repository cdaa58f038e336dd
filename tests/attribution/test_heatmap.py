"""The heatmap as a reader, a screen reader and an XML parser find it."""

from __future__ import annotations

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest

from seuf_core.attribution.heatmap import DIVERGING, SEQUENTIAL, attribution_svg, heatmap_svg

SVG = "{http://www.w3.org/2000/svg}"
AFFINITY = [[0.1, 0.4, 0.2], [0.3, 0.0, 0.25]]
CONTRAST = [[0.1, -0.4, 0.0], [0.3, 0.2, -0.1]]


def drawn(
    scores: list[list[float]] | list[list[float | None]],
    layers: tuple[int, ...] = (1, 4),
    selected: frozenset[tuple[int, int]] = frozenset(),
    title: str = "affinity",
) -> ElementTree.Element:
    return ElementTree.fromstring(heatmap_svg(scores, layers, selected, title))


def cells(picture: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """What is said of a cell when it is pointed at -> its rectangle."""
    rects = [rect for rect in picture.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    return {rect.findtext(f"{SVG}title", ""): rect for rect in rects}


def fills(picture: ElementTree.Element) -> list[str]:
    return [rect.get("fill", "") for rect in cells(picture).values()]


def lightness(colour: str) -> float:
    """Oklab lightness of `#rrggbb`, from the definition."""
    r, g, b = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    )
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return 0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short


def texts(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def test_every_cell_says_its_layer_expert_and_score() -> None:
    said = list(cells(drawn(AFFINITY)))
    assert said[:3] == ["layer 1, expert 0: 0.1", "layer 1, expert 1: 0.4", "layer 1, expert 2: 0.2"]
    assert said[3:] == ["layer 4, expert 0: 0.3", "layer 4, expert 1: 0", "layer 4, expert 2: 0.25"]


def test_rows_are_layers_and_columns_are_experts() -> None:
    picture = drawn(AFFINITY)
    columns = [int(rect.get("x", "")) for rect in cells(picture).values()]
    assert columns == [0, 40, 80, 0, 40, 80]
    rows = [group.get("transform") for group in picture.iter(f"{SVG}g")][1:]
    assert rows == ["translate(0 0)", "translate(0 40)"]
    assert texts(picture)[1:6] == ["1", "4", "0", "1", "2"]
    assert {"layer", "expert"} <= set(texts(picture))


def test_a_score_without_negatives_darkens_evenly_from_its_lowest_to_its_highest() -> None:
    steps = [[i / 20 for i in range(21)]]
    shades = [lightness(colour) for colour in fills(drawn(steps, (0,)))]
    assert shades[0] == pytest.approx(SEQUENTIAL[0][0], abs=0.01)
    assert shades[-1] == pytest.approx(SEQUENTIAL[-1][0], abs=0.01)
    falls = [a - b for a, b in itertools.pairwise(shades)]
    assert max(falls) - min(falls) < 0.012  # equal steps of the score are equal steps to the eye
    assert min(falls) > 0


def test_equal_scores_have_the_middle_colour_and_zero_has_no_sign() -> None:
    colours = set(fills(drawn([[0.5, 0.5], [0.5, 0.5]])))
    assert len(colours) == 1
    assert lightness(colours.pop()) == pytest.approx((SEQUENTIAL[0][0] + SEQUENTIAL[-1][0]) / 2, abs=0.01)
    assert next(iter(cells(drawn([[-0.0, 0.5]], (1,))))) == "layer 1, expert 0: 0"


def test_a_score_with_both_signs_diverges_around_zero() -> None:
    steps = [[i / 10 for i in range(-5, 11)]]
    colours = fills(drawn(steps, (0,)))
    shades = [lightness(colour) for colour in colours]
    assert shades.index(max(shades)) == 5  # zero, though it is not the middle of the scores
    assert shades[0] == pytest.approx(shades[10], abs=0.01)  # -.5 and .5 are as strong
    assert shades[-1] == pytest.approx(DIVERGING[-1][0], abs=0.01)
    red, blue = (int(colours[10][i : i + 2], 16) for i in (1, 5))
    assert red > blue  # above zero is warm
    assert int(colours[0][1:3], 16) < int(colours[0][5:7], 16)


@pytest.mark.parametrize(
    ("scores", "marks"),
    [
        (AFFINITY, ["0.4", "0.2", "0"]),
        (CONTRAST, ["0.4", "0", "−0.4"]),  # noqa: RUF001 -- a true minus sign
        ([[-0.3, -0.1], [-0.2, -0.2]], ["−0.1", "−0.2", "−0.3"]),  # noqa: RUF001
        ([[0.5, 0.5], [0.5, 0.5]], ["0.5"]),
    ],
)
def test_the_colour_bar_has_the_numbers_of_its_ends(scores: list[list[float]], marks: list[str]) -> None:
    assert texts(drawn(scores))[-len(marks) :] == marks
    assert texts(drawn(scores))[-len(marks) - 1] == "layer"


def test_the_colour_bar_runs_from_the_highest_down_to_the_lowest() -> None:
    picture = drawn(AFFINITY)
    bands = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("width") == "14"]
    shades = [lightness(rect.get("fill", "")) for rect in bands]
    places = [float(rect.get("y", "")) for rect in bands]
    assert len(bands) > 20
    assert shades == sorted(shades)
    assert places == sorted(places)


def test_the_selected_experts_are_outlined_and_named() -> None:
    picture = drawn(CONTRAST, selected=frozenset({(4, 0), (1, 2)}))
    outlines = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("stroke-width") == "2"]
    assert [(rect.get("x"), rect.get("y")) for rect in outlines[1:]] == [("78", "-2"), ("-2", "38")]
    assert "2 selected experts" in texts(picture)
    assert "1 selected expert" in texts(drawn(CONTRAST, selected=frozenset({(4, 0)})))
    assert not any("selected" in text for text in texts(drawn(CONTRAST)))


def test_a_screen_reader_gets_title_size_best_and_selection() -> None:
    picture = drawn(CONTRAST, selected=frozenset({(4, 0), (1, 2)}), title="contrast")
    assert picture.get("role") == "img"
    assert picture.get("aria-label") == picture.findtext(f"{SVG}title") == "contrast"
    assert picture.findtext(f"{SVG}desc") == (
        "Scores of 3 experts in each of 2 layers. Highest: layer 4, expert 0, 0.3. "
        "Selected: layer 1, expert 2; layer 4, expert 0."
    )
    assert drawn(CONTRAST).findtext(f"{SVG}desc", "").endswith("Selected: none.")


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_crossed_out_and_moves_no_colour(missing: float | None) -> None:
    picture = drawn([[0.1, missing, 0.2], [0.3, 0.0, 0.25]])
    whole = drawn([[0.1, 0.3, 0.2], [0.3, 0.0, 0.25]])
    assert "layer 1, expert 1: not a number" in cells(picture)
    assert len(list(picture.iter(f"{SVG}path"))) == 1
    assert len(list(whole.iter(f"{SVG}path"))) == 0
    changed = [a != b for a, b in zip(fills(picture), fills(whole), strict=True)]
    assert changed == [False, True, False, False, False, False]


def test_scores_without_any_number_are_still_a_picture() -> None:
    picture = drawn([[math.nan, None], [None, math.nan]])
    assert len(list(picture.iter(f"{SVG}path"))) == 4
    assert "Highest" not in picture.findtext(f"{SVG}desc", "")


def test_an_attribution_is_drawn_with_its_own_selection() -> None:
    selection = [{"layer": 4, "expert": 0, "score": 0.3}]
    attribution = {"score": "contrast", "matrix": CONTRAST, "layers": [1, 4], "selection": selection}
    assert attribution_svg(attribution) == heatmap_svg(CONTRAST, (1, 4), {(4, 0)}, "Experts by contrast")


def test_what_xml_forbids_becomes_a_space() -> None:
    assert drawn(AFFINITY, title="a\x00b\nc\ud800d é").findtext(f"{SVG}title") == "a b c d é"


def test_all_text_is_escaped_and_a_long_title_is_cut_in_sight_only() -> None:
    title = '<script>alert("&")</script> ' + "x" * 200
    picture = drawn(AFFINITY, title=title)
    assert picture.get("aria-label") == picture.findtext(f"{SVG}title") == title
    heading = next(picture.iter(f"{SVG}text"))
    assert heading.text is not None
    assert heading.text.endswith("…")
    assert len(heading.text) * 10 < float(picture.get("width", ""))
    assert heading.findtext(f"{SVG}title") == title
    assert not list(picture.iter(f"{SVG}script"))


@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (48, 128), (1, 2), (61, 256)])
def test_everything_lies_inside_the_picture_and_labels_have_room(layers: int, experts: int) -> None:
    generator = random.Random(0)
    scores = [[generator.random() for _ in range(experts)] for _ in range(layers)]
    svg = heatmap_svg(scores, range(layers), {(layers - 1, experts - 1)}, "affinity")
    picture = ElementTree.fromstring(svg)
    width, height = float(picture.get("width", "")), float(picture.get("height", ""))
    assert picture.get("viewBox") == f"0 0 {width:g} {height:g}"
    assert len(cells(picture)) == layers * experts
    last = list(cells(picture).values())[-1]
    side = float(last.get("width", ""))
    assert 5 <= side <= 38
    assert float(last.get("x", "")) + side <= max(1024, 6 * experts)
    assert side == float(last.get("height", ""))
    assert 58 + float(last.get("x", "")) + side < width - 60  # and the colour bar with its numbers
    numbers = [element for element in picture.iter(f"{SVG}text") if (element.text or "").isdigit()]
    across = [float(n.get("x", "")) for n in numbers if n.get("text-anchor") == "middle"]
    down = [float(n.get("y", "")) for n in numbers if n.get("text-anchor") == "end"]
    assert all(b - a >= 26 for a, b in itertools.pairwise(across))
    assert all(b - a >= 15 for a, b in itertools.pairwise(down))
    assert len(across) >= min(experts, 16) // 2
    assert all(58 + y < height for y in down)


def test_it_stands_alone() -> None:
    """No ids that could clash when two are inlined, nothing fetched, no style sheet, no script."""
    svg = heatmap_svg(CONTRAST, (1, 4), {(1, 0)}, "contrast")
    assert not re.search(r"\bid=|<style|<script|href|url\(", svg)


@pytest.mark.parametrize(
    ("scores", "layers", "selected"),
    [
        ([], (), ()),
        ([[]], (0,), ()),
        ([[0.1], [0.2]], (0,), ()),
        ([[0.1, 0.2], [0.2]], (0, 1), ()),
        ([[0.1, 0.2]], (3,), {(0, 1)}),  # a row number is no layer
        ([[0.1, 0.2]], (3,), {(3, 2)}),
        ([[0.1, 0.2]], (3,), {(3, -1)}),
    ],
)
def test_what_is_no_matrix_or_no_cell_of_it_is_refused(
    scores: list[list[float]], layers: tuple[int, ...], selected: set[tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match="must"):
        heatmap_svg(scores, layers, selected, "affinity")
