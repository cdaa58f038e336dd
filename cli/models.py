"""`seuf models`: the base models a service knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output
from cli.config import connect

if TYPE_CHECKING:
    from client import Client
    from client.types import Model

app = typer.Typer(no_args_is_help=True, help="The base models of a service.")


@app.command("add", epilog="Example:  seuf models add ./OLMoE-1B-7B-0924 --name olmoe")
def add(
    path: Annotated[Path, typer.Argument(help="Folder of the model, on the machine of the service.")],
    name: Annotated[str | None, typer.Option(help="Name to give it; default: the folder's.")] = None,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Register a model folder (safetensors, a Mixture-of-Experts architecture that is known)."""
    with connect(url, key) as client:
        model = client.register_model(name or name_of(path), path.absolute())
    if json:
        output.print_json(model)
    else:
        output.print_fields(_fields(model))


@app.command("list", epilog="Example:  seuf models list --json")
def list_models(
    limit: options.Limit = 20, url: options.Url = None, key: options.Key = None, json: options.Json = False
) -> None:
    """The registered models, newest first."""
    with connect(url, key) as client:
        page = client.models(limit=limit)
    if json:
        output.print_json(page)
        return
    rows = [
        (m["name"], m["model_type"], len(m["moe_layers"]), m["num_experts"], output.size(m["bytes"]), m["id"])
        for m in page["data"]
    ]
    output.print_table(("name", "architecture", "MoE layers", "experts", "size", "id"), rows)


def _fields(model: Model) -> dict[str, object]:
    return {
        "name": model["name"],
        "id": model["id"],
        "architecture": model["model_type"],
        "experts": f"{model['num_experts']} a layer, {model['num_experts_per_tok']} a token, "
        f"{len(model['moe_layers'])} of {model['num_layers']} layers",
        "parameters": f"{model['parameters']:,}",
        "size": f"{output.size(model['bytes'])}, {model['dtype']}",
        "digest": model["digest"],
    }


def name_of(path: Path) -> str:
    """A name the service takes, made from the folder's."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.absolute().name)
    return kept.lstrip("._-")[:60] or "model"


def registered(client: Client, path: Path) -> str:
    """The id of the model at `path`, registering it first if the service does not know it."""
    from client import ApiError

    place, cursor = path.resolve(), None
    while True:
        page = client.models(cursor=cursor, limit=100)
        for model in page["data"]:
            if Path(model["path"]) == place:
                return model["id"]
        cursor = page["next"]
        if cursor is None:
            break
    name = name_of(path)
    for number in range(1, 10):
        try:
            return client.register_model(name if number == 1 else f"{name}-{number}", place)["id"]
        except ApiError as error:
            if error.code != "name_taken" or number == 9:
                raise
    raise AssertionError  # the loop returns or raises
