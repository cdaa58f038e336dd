"""The heatmap of a score, from the attribution of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli import output


def draw(path: Path, attribution: Mapping[str, Any]) -> None:
    """Write the SVG and say where.

    Args:
        attribution: as `seuf_core.pipeline.Attributed.as_dict` gives it.
    """
    from seuf_core.attribution.heatmap import heatmap_svg

    selected = {(one["layer"], one["expert"]) for one in attribution["selection"]}
    title = f"{attribution['score']}: who serves the forget set"
    path.write_text(
        heatmap_svg(attribution["matrix"], attribution["layers"], selected, title), encoding="utf-8"
    )
    output.say(f"The scores are drawn in {path}.")
