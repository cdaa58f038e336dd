"""`seuf reference`: the small real model this project trains for itself, to try everything on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli import options, output
from cli.errors import CommandError

if TYPE_CHECKING:
    from seuf_core.reference.architecture import Architecture, Size, Specialisation

app = typer.Typer(no_args_is_help=True, help="A small real model with facts to forget and facts to keep.")


@app.callback()
def _group() -> None:
    """A small real model with facts to forget and facts to keep."""


@app.command("build", epilog="Example:  seuf reference build")
def build(
    architecture: Annotated[str, typer.Option(help="Architecture of the model.")] = "qwen2_moe",
    specialisation: Annotated[
        str, typer.Option(help="How much routers tell the domains apart.")
    ] = "moderate",
    size: Annotated[
        str, typer.Option(help="full (about a minute) or tiny (seconds, knows little).")
    ] = "full",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    twin: Annotated[bool, typer.Option("--twin", help="Train without the forget domain.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to build in instead of the user's cache.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Train the reference model, or find it in the cache; prints where model and sets are."""
    from cli.live import Live
    from seuf_core.reference import build as build_reference

    _check(architecture, specialisation, size)
    with Live() as live:
        live.show("training")
        made = build_reference(
            architecture=cast("Architecture", architecture),
            specialisation=cast("Specialisation", specialisation),
            seed=seed,
            twin=twin,
            cache=cache,
            size=cast("Size", size),
            progress=lambda step, total, loss: live.show("training", step, total, step=step, loss=loss),
        )
    places: dict[str, Any] = {
        "folder": made.folder,
        "model": made.model,
        "forget": made.forget,
        "retain": made.retain,
        "evaluation": made.probes,
    }
    if json:
        output.print_json({name: str(place) for name, place in places.items()} | {"report": made.report})
        return
    output.print_fields(places)
    output.say(
        f"Try it: seuf run --model {made.model} --forget {made.forget} --retain {made.retain} "
        f"--evaluation {made.probes} --out unlearned"
    )


def _check(architecture: str, specialisation: str, size: str) -> None:
    from typing import get_args

    from seuf_core.reference import architecture as shapes

    for name, given, choices in (
        ("architecture", architecture, get_args(shapes.Architecture)),
        ("specialisation", specialisation, get_args(shapes.Specialisation)),
        ("size", size, get_args(shapes.Size)),
    ):
        if given not in choices:
            raise CommandError(f"There is no {name} {given!r}.", f"Use one of {', '.join(choices)}.")
