"""`seuf up`: the whole service on this machine: database, API and worker, from one command."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output
from cli.config import Connection, save, write_private
from cli.errors import CommandError
from cli.keys import WHO

if TYPE_CHECKING:
    from api.settings import ApiSettings

STOP_SECONDS = 3  # how long open requests (event streams among them) may go on when the service stops


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Folder of everything the service writes.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one; default 8321.")] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Allow a host other machines can reach (no TLS here).")
    ] = False,
    worker: Annotated[bool, typer.Option(help="Run jobs here too.")] = True,
    json: options.Json = False,
) -> None:
    """Start the service on this machine: SQLite, local files, one worker. Ctrl-C stops it."""
    settings = _settings(data_dir, host, port)
    _check_host(settings.host, allow_remote)
    listening = _listen(settings.host, settings.port)
    url = _url(settings.host, listening.getsockname()[1])
    from store import migrate

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    migrate.upgrade(settings.database_url)
    key, fresh = _key(settings)
    config = save(Connection(url, key))

    def announce() -> None:
        if json:
            output.print_json(
                {"url": url, "docs": f"{url}/docs", "config": str(config), "key": key if fresh else None}
            )
        else:
            _banner(url, key if fresh else None, config)

    _serve(settings, listening, worker, announce)


def _settings(data_dir: Path | None, host: str | None, port: int | None) -> ApiSettings:
    from api.settings import ApiSettings

    given: dict[str, Any] = {"data_dir": data_dir, "host": host, "port": port}
    settings = ApiSettings(**{name: value for name, value in given.items() if value is not None})
    if settings.lane != "database":
        raise CommandError(
            "`seuf up` runs everything on one machine, but SEUF_BROKER_URL or SEUF_LANE asks for a cluster.",
            "Unset them, or start the cluster with `docker compose up`.",
        )
    return settings


def _check_host(host: str, allow_remote: bool) -> None:
    """Loopback only, unless the user says otherwise: keys would cross the network in the clear."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not allow_remote:
        raise CommandError(
            f"{host} can be reached from other machines, and this service speaks no TLS.",
            "Leave --host out, or put a TLS proxy in front and add --allow-remote.",
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise CommandError(
            f"Port {port} of {host} cannot be had ({error.strerror}).",
            "Stop what listens there (another `seuf up`?), or give another one with --port.",
        ) from error
    return listening


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


def _key(settings: ApiSettings) -> tuple[str, bool]:
    """The key of this service's own commands, and whether it was made just now.

    It is kept beside the secret in data_dir, for its owner only; one that was revoked is replaced.
    """
    from store.audit import Audit
    from store.database import Database
    from store.keys import Keys, authenticate

    path, secret = settings.data_dir / "key", settings.secret_bytes()
    database = Database(settings.database_url)
    try:
        if path.exists():
            token = path.read_text().strip()
            with database.read() as session:
                if authenticate(session, token, secret) is not None:
                    return token, False
        with database.write() as session:
            made = Keys(session).create("seuf up", secret)
            Audit(session).record(WHO, "key.create", made.row.id)
        token = made.token
        write_private(path, token + "\n")
        return token, True
    finally:
        database.dispose()


def _banner(url: str, key: str | None, config: Path) -> None:
    output.say(f"seuf is up at {url}   (API documentation: {url}/docs)")
    if key is not None:
        output.say(f"API key, shown this once and saved in {config}:\n  {key}")
    output.say("Try it in another terminal:")
    output.say("  seuf submit --model ./model --forget forget.jsonl --retain retain.jsonl --watch")
    output.say("Ctrl-C stops it.")


def _serve(
    settings: ApiSettings, listening: socket.socket, with_worker: bool, announce: Callable[[], None]
) -> None:
    """Run API and worker until a signal; then stop both, the API first."""
    import uvicorn

    from api.app import create_app
    from cli.child import WorkerProcess
    from telemetry import logs, tracing

    class Announced(uvicorn.Server):
        """Says that it is up once it really answers."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce()

    # A person reads this terminal: what is usual is not told unless they ask for it.
    logs.configure(settings.log_format, settings.log_level if "log_level" in settings.model_fields_set else "WARNING")
    if settings.tracing:
        tracing.start("seuf-api")
    config = uvicorn.Config(
        create_app(settings), log_config=None, timeout_graceful_shutdown=STOP_SECONDS, lifespan="on"
    )
    worker = WorkerProcess(settings) if with_worker else None
    stopping = False

    def signalled(_number: int, _frame: FrameType | None) -> None:
        # The first signal is uvicorn's, which passes it on here when it has stopped; a later one means now.
        if stopping and worker is not None:
            worker.kill()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signalled)
    if worker is not None:
        worker.start()
    try:
        Announced(config).run(sockets=[listening])
    finally:
        stopping = True
        if worker is not None:
            output.say("Stopping; a running job goes on from its last step at the next start.")
            worker.stop()
