"""`seuf apply-delta` and `seuf verify`: checkpoints on this machine, without a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output

if TYPE_CHECKING:
    from seuf_core.checkpoint.manifest import Manifest


def apply_delta(
    base: Annotated[Path, typer.Argument(help="Folder of the model the delta was made from; only read.")],
    delta: Annotated[Path, typer.Argument(help="The delta.safetensors of a checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to create for the checkpoint.")],
    hardlinks: options.Hardlinks = False,
    json: options.Json = False,
) -> None:
    """Rebuild a checkpoint from its base and its delta, and check the sha256 of every file."""
    options.existing(base, "base model")
    options.existing(delta, "delta")
    from cli.live import Live
    from seuf_core.checkpoint import delta as deltas

    with Live() as live:
        manifest = deltas.apply_delta(
            base,
            delta,
            out,
            progress=lambda done, total: live.show("writing", done, total),
            share="hardlink" if hardlinks else "reflink",
        )
    if json:
        output.print_json({"checkpoint": str(out), **_facts(manifest)})
        return
    output.say(f"{_size(manifest)}: every sha256 is the one that the delta promises.")
    output.say(
        f"{manifest.parameters_changed:,} of {manifest.parameters_total:,} parameters differ from the base, "
        f"in {len(manifest.changed)} tensors."
    )
    typer.echo(str(out))


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with its manifest.json.")],
    json: options.Json = False,
) -> None:
    """Check size and sha256 of every file that a checkpoint's manifest names."""
    options.existing(folder, "checkpoint")
    from cli.live import Live
    from seuf_core.checkpoint.manifest import MANIFEST, read_manifest, verify_files

    manifest = read_manifest(folder)
    with Live() as live:
        verify_files(folder, manifest, lambda done, total: live.show("reading", done, total))
    listed = {MANIFEST, *(entry.name for entry in manifest.files)}
    strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in listed)
    if json:
        output.print_json({"checkpoint": str(folder), **_facts(manifest), "not_listed": strangers})
        return
    output.say(f"{_size(manifest)}: each is the one that {MANIFEST} describes.")
    if strangers:
        output.say(f"{MANIFEST} says nothing of {', '.join(strangers)}.")
    typer.echo(str(folder))


def _facts(manifest: Manifest) -> dict[str, object]:
    return {
        "base": manifest.base.digest,
        "created_by": manifest.created_by,
        "files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "tensors_changed": len(manifest.changed),
        "parameters_changed": manifest.parameters_changed,
        "parameters_total": manifest.parameters_total,
    }


def _size(manifest: Manifest) -> str:
    return f"{len(manifest.files)} files, {output.size(sum(entry.bytes for entry in manifest.files))}"
