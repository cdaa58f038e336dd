"""`seuf files`: forget, retain and evaluation sets of a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output
from cli.config import connect
from cli.errors import CommandError

if TYPE_CHECKING:
    from client import Client
    from client.types import File, Format, Purpose

app = typer.Typer(no_args_is_help=True, help="The forget, retain and evaluation sets of a service.")


@app.command("upload", epilog="Example:  seuf files upload forget.jsonl --purpose forget")
def upload(
    path: Annotated[Path, typer.Argument(help="JSON Lines, CSV, Parquet or text file, by its extension.")],
    purpose: Annotated[str, typer.Option(help="forget, retain or evaluation.")],
    format: Annotated[  # noqa: A002  (the option's name)
        str | None,
        typer.Option(help="jsonl, csv, parquet or text, where the extension does not say it."),
    ] = None,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Upload a set; every line is checked. A large file goes in parts; run it again to go on after a cut."""
    with connect(url, key) as client:
        file = send(client, path, purpose, format)
    if json:
        output.print_json(file)
    else:
        output.print_fields(
            {
                "id": file["id"],
                "purpose": file["purpose"],
                "format": file["format"],
                "examples": file["examples"],
                "tokens (estimate)": file["tokens_estimate"],
                "sha256": file["sha256"],
            }
        )


@app.command("list", epilog="Example:  seuf files list --json")
def list_files(
    limit: options.Limit = 20, url: options.Url = None, key: options.Key = None, json: options.Json = False
) -> None:
    """The uploaded files, newest first."""
    with connect(url, key) as client:
        page = client.files(limit=limit)
    if json:
        output.print_json(page)
        return
    rows = [
        (f["purpose"], f["filename"], f["examples"], output.size(f["bytes"]), f["id"]) for f in page["data"]
    ]
    output.print_table(("purpose", "name", "examples", "size", "id"), rows)


def send(client: Client, path: Path, purpose: str, format: str | None = None) -> File:  # noqa: A002
    """Upload, with the first broken lines in the error when the service refuses the file."""
    from typing import cast

    from cli.live import Live
    from client import ApiError

    options.existing(path, f"{purpose} set")
    try:
        with Live() as live:
            return client.upload(
                path,
                cast("Purpose", purpose),
                format=cast("Format | None", format),
                progress=lambda name, done, total: live.show(name, done, total),
            )
    except ApiError as error:
        if error.code != "invalid_examples":
            raise
        kind = "row" if path.suffix in (".parquet", ".pq") else "line"
        broken = [f"{kind} {e['line']}: {e['detail']}" for e in error.errors[:3] if e.get("line")]
        raise CommandError(
            f"{path}: {' '.join(broken) or error.detail}", "Correct it and try again."
        ) from error


def given(client: Client, text: str, purpose: str) -> str:
    """The id behind what the user wrote: an id of an uploaded file, or a path that is uploaded now."""
    if not Path(text).exists() and text.startswith("file_"):
        return text
    return send(client, Path(text), purpose)["id"]
