"""`seuf keys`: API keys, made, rotated and revoked by whoever holds the database (SEUF_DATABASE_URL)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output
from cli.errors import CommandError

if TYPE_CHECKING:
    from store.audit import Audit
    from store.keys import Keys, NewKey

app = typer.Typer(no_args_is_help=True, help="API keys of a service; works on its database, not over HTTP.")

WHO = "cli"  # in the audit log: whoever holds the database, rather than a key
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
KeyId = Annotated[str, typer.Argument(help="Id of the key.")]
TenantName = Annotated[str, typer.Option("--tenant", help="Whose key it is (seuf tenants create).")]
Expires = Annotated[
    str | None,
    typer.Option(help="When it ends: 90d, 12h, 30m, or a time such as 2027-01-31T12:00Z.", metavar="WHEN"),
]


@app.command("create", epilog="Example:  seuf keys create --name ci --scope files:write --scope jobs:write")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it may do, such as jobs:read; repeat it. Default: admin, everything."),
    ] = None,
    expires: Expires = None,
    tenant: TenantName = "default",
    json: options.Json = False,
) -> None:
    """Make a key and print it, this once."""
    end = when(expires)
    with _keys(tenant) as (keys, audit, secret):
        made = keys.create(name, secret, scope or ["admin"], end)
        audit.record(WHO, "key.create", made.row.id)
    _print_made(made, json)


@app.command("rotate", epilog="Example:  seuf keys rotate key_a2b3c4d5e6f7g2h3i4j5 --overlap 24h")
def rotate(
    key_id: KeyId,
    overlap: Annotated[str, typer.Option(help="How long the old key goes on: 24h, 30m, 0m.")] = "24h",
    expires: Expires = None,
    tenant: TenantName = "default",
    json: options.Json = False,
) -> None:
    """A new key with the same name and scopes, printed this once; the old one goes on for the overlap."""
    end, pause = when(expires), _span(overlap, "--overlap")
    with _keys(tenant) as (keys, audit, secret):
        made = keys.rotate(key_id, secret, pause, end)
        audit.record(WHO, "key.rotate", key_id)
    _print_made(made, json)


@app.command("list", epilog="Example:  seuf keys list")
def list_keys(tenant: TenantName = "default", json: options.Json = False) -> None:
    """The keys, newest first; only their beginning is known."""
    with _keys(tenant) as (keys, _, _secret):
        rows, cursor = [], None
        while True:
            page = keys.list(cursor, limit=100)
            rows += page.data
            cursor = page.next
            if cursor is None:
                break
    now = datetime.now(UTC)
    states = [
        "revoked" if row.revoked_at else "expired" if row.expires_at and row.expires_at <= now else "valid"
        for row in rows
    ]
    if json:
        output.print_json(
            [
                {
                    "id": row.id,
                    "name": row.name,
                    "begins": row.prefix,
                    "scopes": row.scopes,
                    "state": state,
                    "expires_at": row.expires_at.isoformat() if row.expires_at else None,
                    "rotated_to": row.rotated_to,
                }
                for row, state in zip(rows, states, strict=True)
            ]
        )
        return
    output.print_table(
        ("name", "begins with", "scopes", "state", "until", "id"),
        [
            (row.name, row.prefix, " ".join(row.scopes), state, _day(row.expires_at), row.id)
            for row, state in zip(rows, states, strict=True)
        ],
    )


@app.command("revoke", epilog="Example:  seuf keys revoke key_a2b3c4d5e6f7g2h3i4j5")
def revoke(key_id: KeyId, tenant: TenantName = "default", json: options.Json = False) -> None:
    """Take a key back: within seconds it opens nothing."""
    with _keys(tenant) as (keys, audit, _secret):
        keys.revoke(key_id)
        audit.record(WHO, "key.revoke", key_id)
    if json:
        output.print_json({"id": key_id, "revoked": True})
    else:
        output.say(f"{key_id} is revoked.")


@contextmanager
def _keys(tenant: str) -> Iterator[tuple[Keys, Audit, bytes]]:
    """The keys and the audit log of a tenant that exists, in one transaction, and the secret of the settings."""
    from store.audit import Audit
    from store.database import Database
    from store.keys import Keys
    from store.settings import Settings
    from store.tenants import Tenants

    settings = Settings()
    database = Database(settings.database_url)
    try:
        with database.write() as session:
            Tenants(session).get(tenant)
            yield Keys(session, tenant), Audit(session, tenant), settings.secret_bytes()
    finally:
        database.dispose()


def _print_made(made: NewKey, json: bool) -> None:
    row = made.row
    if json:
        shown = {"id": row.id, "name": row.name, "scopes": row.scopes, "key": made.token}
        output.print_json({**shown, "expires_at": row.expires_at.isoformat() if row.expires_at else None})
        return
    until = f", until {_day(row.expires_at)}" if row.expires_at else ""
    output.say(f"{row.id} ({' '.join(row.scopes)}{until}): keep this key, it is not shown again.")
    typer.echo(made.token)


def when(text: str | None) -> datetime | None:
    """90d, 12h, 30m from now, or a time with its zone (Z or an offset)."""
    if text is None:
        return None
    if text[-1:] in _UNITS and text[:-1].isdigit():
        return datetime.now(UTC) + _span(text, "--expires")
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(
            f"--expires {text} is no time.", "Write 90d, 12h, 30m or 2027-01-31T12:00Z."
        ) from error
    if at.tzinfo is None:
        raise CommandError(f"--expires {text} has no zone.", f"Write {text}Z for UTC.")
    return at


def _span(text: str, option: str) -> timedelta:
    if text[-1:] not in _UNITS or not text[:-1].isdigit() or len(text) > 6:
        raise CommandError(f"{option} {text} is no length of time.", "Write it as 90d, 12h or 30m.")
    return timedelta(**{_UNITS[text[-1]]: int(text[:-1])})


def _day(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else ""
