"""`seuf audit`: check the audit log, from a file or straight from the service."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output
from cli.config import connect
from cli.errors import CommandError

if TYPE_CHECKING:
    from client import Client
    from store.chain import Findings, Head

app = typer.Typer(no_args_is_help=True, help="The audit log of a service: fetch it, check it.")

_KEY_HELP = "Public key that heads must be signed with: a PEM file, the answer of GET /audit/key, or its id."


@app.command("export", epilog="Example:  seuf audit export --out audit.jsonl")
def export(
    out: Annotated[Path, typer.Option(help="File to write.")],
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Write the whole log and its newest head to a file."""
    lines = 0
    with connect(url, key) as seuf, out.open("wb") as file:
        for line in seuf.audit.export():
            file.write(line + b"\n")
            lines += 1
    if json:
        output.print_json({"file": str(out), "lines": lines})
    else:
        output.say(f"Written to {out}. Check it with: seuf audit verify {out}")


@app.command(
    "verify", epilog="Example:  seuf audit verify audit.jsonl --public-key audit-key.pem --head kept.json"
)
def verify(
    file: Annotated[Path | None, typer.Argument(help="A file of `seuf audit export`.")] = None,
    from_service: Annotated[
        bool,
        typer.Option(
            "--from-service", help="Fetch the log, every head and the key from the service instead."
        ),
    ] = False,
    public_key: Annotated[list[str] | None, typer.Option(help=_KEY_HELP)] = None,
    head: Annotated[
        list[Path] | None,
        typer.Option(help="File of heads that were kept elsewhere; the log must reach each."),
    ] = None,
    url: options.Url = None,
    key: options.Key = None,
    json: options.Json = False,
) -> None:
    """Check that the audit log is what was written: exit code 0, or 1 with the first row that is not."""
    from store import chain

    if (file is None) != from_service:
        raise CommandError("Give either a file or --from-service.", "`seuf audit export` writes such a file.")
    trusted = {_key_id(text) for text in public_key or []}
    kept = [one for path in head or [] for one in _heads(path)]
    with ExitStack() as stack:
        if file is not None:
            lines: Iterable[bytes] = stack.enter_context(options.existing(file, "file").open("rb"))
        else:
            seuf = stack.enter_context(connect(url, key))
            trusted = trusted or {seuf.audit.key()["key_id"]}
            lines = _everything(seuf)
        try:
            found = chain.verify(
                lines, trusted=trusted, kept=kept, all_heads=from_service, now=datetime.now(UTC)
            )
        except chain.BrokenError as error:
            if json:
                output.print_json(
                    {"whole": False, "code": error.code, "row": error.seq, "message": str(error)}
                )
            raise CommandError(
                f"The audit log is broken. {error}",
                "Keep this file, and look at who could write to the database.",
            ) from error
    if json:
        output.print_json({"whole": True, **asdict(found), "unsigned": found.unsigned})
    else:
        _tell(found, bool(public_key), len(kept))


def _everything(seuf: Client) -> Iterator[bytes]:
    """The export, and every other head up to the one that ends it (later ones are signed while we read)."""
    line = b""
    for line in seuf.audit.export():
        yield line
    newest = jsonlib.loads(line or b"{}").get("head")
    if newest is not None:
        yield from (
            jsonlib.dumps({"head": one}).encode() for one in seuf.audit.heads() if one["seq"] < newest["seq"]
        )


def _tell(found: Findings, pinned: bool, kept: int) -> None:
    """What was shown, and what no such check can show."""
    newest = found.newest
    assert newest is not None
    typer.echo(
        f"Whole: rows 1 to {newest.seq} of {found.tenant} are what they were when row {newest.seq} was signed."
    )
    typer.echo(f"  signed  {newest.at} by key {newest.key_id}")
    typer.echo("  none of them was changed, dropped, moved or put in between since then")
    if kept:
        typer.echo(f"  the log reaches each of the {kept} heads that were kept elsewhere")
    for doubt in found.doubts:
        typer.echo(f"Ask why: {doubt}")
    typer.echo("Not shown:")
    if found.unsigned:
        typer.echo(
            f"  - the last {found.unsigned} rows: not signed yet, they could be replaced or cut off unseen"
        )
    if not kept:
        typer.echo(
            "  - that no later rows and heads were cut off together: keep heads elsewhere and give one with --head"
        )
    if not pinned:
        typer.echo("  - whose key that is: compare it with the one you kept, or give that with --public-key")
    typer.echo("  - that somebody who holds the signing key did not write another log")
    typer.echo("  - that everything that happened was recorded")
    output.say("Keep this head elsewhere:")
    output.say(jsonlib.dumps({"head": asdict(newest)}))


def _key_id(given: str) -> str:
    """The id of a key given as id, PEM file, or answer of GET /audit/key."""
    if len(given) == 64 and set(given) <= set("0123456789abcdef"):
        return given
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from store.chain import key_id_of

    text = options.existing(Path(given), "public key").read_text(encoding="utf-8")
    try:
        pem = jsonlib.loads(text)["pem"] if text.lstrip().startswith("{") else text
        key = load_pem_public_key(pem.encode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{given} holds no public key.", "Give what GET /audit/key answers.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise CommandError(f"{given} is not an ed25519 key.")
    return key_id_of(key)


def _heads(path: Path) -> list[Head]:
    """Heads as they are shown anywhere, one after the other: a page of GET /audit/heads, {"head": ...}, or bare."""
    from store.chain import Head

    text = options.existing(path, "file").read_text(encoding="utf-8")
    heads: list[Head] = []
    try:
        for one in _documents(text):
            found = [given for given in one.get("data", [one]) if "row" not in given]
            heads.extend(Head(**given.get("head", given)) for given in found)
    except (ValueError, TypeError, AttributeError) as error:
        raise CommandError(
            f"{path} holds no heads.", "Give what GET /audit/heads or `verify` shows."
        ) from error
    if not heads:
        raise CommandError(f"{path} holds no heads.", "Give what GET /audit/heads or `verify` shows.")
    return heads


def _documents(text: str) -> Iterator[Any]:
    """Every JSON document of a text, with or without lines between them."""
    decoder, rest = jsonlib.JSONDecoder(), text.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        yield document
        rest = rest[end:].lstrip()
