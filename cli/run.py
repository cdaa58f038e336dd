"""`seuf run`: unlearning on this machine, without a service."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import method, options, output

if TYPE_CHECKING:
    from seuf_core import UnlearnResult


def run(
    context: typer.Context,
    model: options.Model,
    forget: options.Forget,
    out: Annotated[Path, typer.Option(help="Folder to create for the unlearned model.")],
    retain: options.Retain = None,
    evaluation: options.Evaluation = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of training checkpoints: the same command with it goes on where it stopped."
        ),
    ] = None,
    heatmap: options.Heatmap = None,
    memory: options.Memory = None,
    hardlinks: options.Hardlinks = False,
    json: options.Json = False,
) -> None:
    """Make a model forget, here and now: the same method as the service, without one."""
    # Checked before torch is loaded, which takes seconds.
    _, wanted = method.given(context)
    options.existing(forget, "forget set")
    wanted.check_retain(given=retain is not None)
    if heatmap is not None:
        wanted.to_attribute()
    from cli import here
    from cli.live import Live
    from seuf_core import unlearn

    with Live() as live, tempfile.TemporaryDirectory(prefix="seuf-run-") as scratch:
        live.show("loading")
        here.quietly()
        result = unlearn(
            model,
            forget,
            out,
            retain=retain,
            evaluation=evaluation,
            method=wanted,
            work=work or Path(scratch),
            observer=here.Shown(live),
            memory=memory,
            share="hardlink" if hardlinks else "reflink",
        )
    if heatmap is not None and result.attribution is not None:
        here.draw(heatmap, result.attribution)
    if json:
        output.print_json(_as_json(result))
    else:
        _tell(result)


def _as_json(result: UnlearnResult) -> dict[str, Any]:
    return {
        "checkpoint": str(result.checkpoint),
        "selection": result.selection,
        "metrics": result.metrics,
        "chosen": result.chosen,
        "parameters_changed": result.parameters_changed,
        "parameters_total": result.parameters_total,
        "seconds": result.seconds,
        "plan": result.plan,
        "actual": result.actual,
    }


def _tell(result: UnlearnResult) -> None:
    output.print_metrics(result.metrics)
    share = 100 * result.parameters_changed / result.parameters_total
    output.say(
        f"{result.parameters_changed:,} of {result.parameters_total:,} parameters changed ({share:.2f} %)."
    )
    output.say(f"The unlearned model is in {result.checkpoint}; open it like any model folder.")
    typer.echo(str(result.checkpoint))
