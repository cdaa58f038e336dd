"""`seuf attribute`: which experts serve the forget set, without training anything."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import method, options, output

if TYPE_CHECKING:
    from seuf_core import Attributed

MEASURING = ("no_retain_probes", "probes_cut")  # warnings about figures, which nothing here measures
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
    from cli import here
    from cli.live import Live
    from seuf_core import attribute as attribute_here

    with Live() as live:
        live.show("loading")
        here.quietly()
        found = attribute_here(
            model, forget, retain=retain, method=wanted, observer=here.Shown(live, MEASURING)
        )
    if matrix is not None:
        matrix.write_text(json_module.dumps(found.as_dict()) + "\n", encoding="utf-8")
    if heatmap is not None:
        here.draw(heatmap, found.as_dict())
    if json:
        output.print_json(found.as_dict())
    else:
        _tell(found)


def _tell(found: Attributed) -> None:
    """The selected experts and the best of the others, then how far to trust them."""
    from seuf_core.attribution.selection import coverage

    rows: list[tuple[object, ...]] = []
    for place, one in enumerate(found.selection, start=1):
        seen = coverage(found.forget, found.selection[:place])
        rows.append((one.layer, one.expert, f"{one.score:.4f}", f"{seen:.3f}", "yes"))
    for layer, expert, score in _others(found)[: max(0, SHOWN - len(rows))]:
        rows.append((layer, expert, f"{score:.4f}", "", ""))
    output.print_table(("layer", "expert", found.score, "coverage", "selected"), rows)
    halves = found.stability
    figures = {
        "of the forget answer tokens see a selected expert (coverage)": found.coverage,
        "overlap of the experts that each half of the forget set would select (Jaccard)": halves.jaccard_selection,
        "overlap of each layer's top experts between the halves (Jaccard)": halves.jaccard_top_k,
        "rank correlation of all experts between the halves (Spearman)": halves.rank_correlation,
    }
    typer.echo()
    for what, value in figures.items():
        if value is not None:
            typer.echo(f"{value:.3f}  {what}")


def _others(found: Attributed) -> list[tuple[int, int, float]]:
    """(layer, expert, score) of every expert that is not selected, the highest score first."""
    taken = {(one.layer, one.expert) for one in found.selection}
    places = [
        (layer, expert, score)
        for layer, row in zip(found.layers, found.matrix.tolist(), strict=True)
        for expert, score in enumerate(row)
        if (layer, expert) not in taken
    ]
    return sorted(places, key=lambda place: -place[2])
