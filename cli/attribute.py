"""`seuf attribute`: which experts serve the forget set, without training anything."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import drawing, method, options, output

SHOWN = 10  # experts in the table, if fewer are selected


def attribute(
    context: typer.Context,
    model: options.Model,
    forget: options.Forget,
    retain: options.Retain = None,
    heatmap: options.Heatmap = None,
    matrix: Annotated[
        Path | None, typer.Option(help="File to write every score to (JSON).", metavar="FILE.json")
    ] = None,
    json: options.Json = False,
) -> None:
    """Score the experts and show which a job would train. Changes nothing."""
    _, wanted = method.given(context)
    options.existing(forget, "forget set")
    wanted.to_attribute().check_retain(given=retain is not None)
    from cli.here import Shown
    from cli.live import Live
    from seuf_core import attribute as attribute_here

    with Live() as live:
        live.show("loading")
        found = attribute_here(model, forget, retain=retain, method=wanted, observer=Shown(live)).as_dict()
    if matrix is not None:
        matrix.write_text(json_module.dumps(found) + "\n", encoding="utf-8")
    if heatmap is not None:
        drawing.draw(heatmap, found)
    if json:
        output.print_json(found)
    else:
        _tell(found)


def _tell(found: Mapping[str, Any]) -> None:
    """The selected experts and the best of the others, then how far to trust them."""
    selected = [(one["layer"], one["expert"], one["score"]) for one in found["selection"]]
    taken = {place[:2] for place in selected}
    others = [
        (layer, expert, score)
        for layer, row in zip(found["layers"], found["matrix"], strict=True)
        for expert, score in enumerate(row)
        if (layer, expert) not in taken
    ]
    others.sort(key=lambda place: -place[2])
    rows = [(*place, "yes") for place in selected]
    rows += [(*place, "") for place in others[: max(0, SHOWN - len(selected))]]
    table = [(layer, expert, f"{score:.4f}", chosen) for layer, expert, score, chosen in rows]
    output.print_table(("layer", "expert", found["score"], "selected"), table)
    stability = found["stability"]
    typer.echo()
    output.print_fields(
        {
            "coverage": f"{found['coverage']:.3f}  of the forget answer tokens see a selected expert",
            "stability": f"{stability['jaccard_top_k']:.3f}  two halves of the forget set agree on the top experts "
            "(Jaccard)",
            "": f"{stability['rank_correlation']:.3f}  and on the order of all (Spearman)",
        }
    )
