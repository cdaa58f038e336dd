"""`seuf keys`: API keys, made and revoked by whoever holds the database (SEUF_DATABASE_URL)."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options, output

app = typer.Typer(no_args_is_help=True, help="API keys of a service; works on its database, not over HTTP.")


@app.command("create", epilog="Example:  seuf keys create --name ci")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")], json: options.Json = False
) -> None:
    """Make a key and print it, this once."""
    from store.database import Database
    from store.keys import Keys
    from store.settings import Settings

    settings = Settings()
    with Database(settings.database_url).write() as session:
        made = Keys(session).create(name, settings.secret_bytes())
    if json:
        output.print_json({"id": made.row.id, "name": name, "key": made.token})
    else:
        output.say(f"{made.row.id}: keep this key, it is not shown again.")
        typer.echo(made.token)


@app.command("list", epilog="Example:  seuf keys list")
def list_keys(json: options.Json = False) -> None:
    """The keys, newest first; only their beginning is known."""
    from store.database import Database
    from store.keys import Keys
    from store.settings import Settings

    with Database(Settings().database_url).read() as session:
        rows = Keys(session).list(limit=100).data
    if json:
        output.print_json(
            [
                {"id": r.id, "name": r.name, "prefix": r.prefix, "revoked": r.revoked_at is not None}
                for r in rows
            ]
        )
        return
    output.print_table(
        ("name", "begins with", "state", "id"),
        [(r.name, r.prefix, "revoked" if r.revoked_at else "valid", r.id) for r in rows],
    )


@app.command("revoke", epilog="Example:  seuf keys revoke key_a2b3c4d5e6f7g2h3i4j5")
def revoke(key_id: Annotated[str, typer.Argument(help="Id of the key.")], json: options.Json = False) -> None:
    """Take a key back: from the next request on it opens nothing."""
    from store.database import Database
    from store.keys import Keys
    from store.settings import Settings

    with Database(Settings().database_url).write() as session:
        Keys(session).revoke(key_id)
    if json:
        output.print_json({"id": key_id, "revoked": True})
    else:
        output.say(f"{key_id} is revoked.")
