"""`seuf tenants`: who shares a service, and how much each may use of it; by whoever holds its database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output
from cli.errors import CommandError
from cli.keys import WHO

if TYPE_CHECKING:
    from store.limits import Limits
    from store.tables import Tenant
    from store.tenants import Tenants

app = typer.Typer(no_args_is_help=True, help="Tenants of a service; works on its database, not over HTTP.")

Name = Annotated[str, typer.Argument(help="Name of the tenant.")]
Jobs = Annotated[
    str | None,
    typer.Option(
        "--max-active-jobs", help="Queued and running jobs; 0: any number; default: as the settings."
    ),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--max-stored-bytes", help="Sets, parts and checkpoints; 0: any number; default: as the settings."
    ),
]
Rate = Annotated[
    str | None,
    typer.Option("--requests-per-minute", help="Of each key; 0: any number; default: as the settings."),
]


@app.command("create", epilog="Example:  seuf tenants create acme --max-active-jobs 4")
def create(
    name: Name, jobs: Jobs = None, stored: Bytes = None, rate: Rate = None, json: options.Json = False
) -> None:
    """Make a tenant; then make it a key: seuf keys create --tenant."""
    from store.audit import Audit

    with _tenants() as (tenants, limits):
        row = tenants.create(name)
        _apply(row, jobs, stored, rate)
        Audit(tenants.session, row.id).record(WHO, "tenant.create", row.id)
        shown = _shown(row, limits)
    _print([shown], json)


@app.command("set", epilog="Example:  seuf tenants set acme --max-active-jobs default")
def set_limits(
    name: Name, jobs: Jobs = None, stored: Bytes = None, rate: Rate = None, json: options.Json = False
) -> None:
    """Change what a tenant may use; what is not given stays. A running API sees it within seconds."""
    from store.audit import Audit

    with _tenants() as (tenants, limits):
        row = tenants.get(name)
        _apply(row, jobs, stored, rate)
        Audit(tenants.session, row.id).record(WHO, "tenant.update", row.id)
        shown = _shown(row, limits)
    _print([shown], json)


@app.command("list", epilog="Example:  seuf tenants list")
def list_tenants(json: options.Json = False) -> None:
    """Every tenant with its limits and what it uses."""
    with _tenants() as (tenants, limits):
        tenants.get("default")
        shown = [_shown(row, limits) for row in tenants.list()]
    _print(shown, json)


@contextmanager
def _tenants() -> Iterator[tuple[Tenants, Limits]]:
    from store.database import Database
    from store.settings import Settings
    from store.tenants import Tenants

    settings = Settings()
    database = Database(settings.database_url)
    try:
        with database.write() as session:
            yield Tenants(session), settings.limits()
    finally:
        database.dispose()


def _apply(row: Tenant, jobs: str | None, stored: str | None, rate: str | None) -> None:
    given = {"max_active_jobs": jobs, "max_stored_bytes": stored, "requests_per_minute": rate}
    for field, text in given.items():
        if text is None:
            continue
        option = f"--{field.replace('_', '-')}"
        longest = 18 if field == "max_stored_bytes" else 9  # what the columns hold
        if text != "default" and not (text.isascii() and text.isdigit() and len(text) <= longest):
            raise CommandError(f"{option} {text} is no number.", "Give a whole number, 0 or `default`.")
        setattr(row, field, None if text == "default" else int(text))


def _shown(row: Tenant, settings: Limits) -> dict[str, Any]:
    from sqlalchemy.orm import object_session

    from store.tenants import Quota, limits_of

    session = object_session(row)
    assert session is not None
    session.flush()
    limits, used = limits_of(session, row.id, settings), Quota(session, row.id).used()
    return {
        "tenant": row.id,
        "active_jobs": used.active_jobs,
        "max_active_jobs": limits.max_active_jobs,
        "stored_bytes": used.stored_bytes,
        "max_stored_bytes": limits.max_stored_bytes,
        "requests_per_minute": limits.requests_per_minute,
    }


def _print(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        output.print_json(rows)
        return
    output.print_table(
        ("tenant", "jobs", "allowed", "stored", "allowed", "requests a minute"),
        [
            (
                row["tenant"],
                row["active_jobs"],
                row["max_active_jobs"] or "any",
                output.size(row["stored_bytes"]),
                output.size(row["max_stored_bytes"]) if row["max_stored_bytes"] else "any",
                row["requests_per_minute"] or "any",
            )
            for row in rows
        ],
    )
