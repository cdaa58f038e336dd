"""Where the service is and which key opens it: options, SEUF_URL and SEUF_API_KEY, the config file."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.errors import CommandError

if TYPE_CHECKING:
    from client import Client

DEFAULT_URL = "http://127.0.0.1:8321"


@dataclass(frozen=True)
class Connection:
    """An address and a key."""

    url: str
    key: str


def config_path() -> Path:
    """~/.config/seuf/config.json, or under XDG_CONFIG_HOME."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "seuf" / "config.json"


def save(connection: Connection) -> Path:
    """Write the config file, readable by its owner only, whole or not at all."""
    path = config_path()
    write_private(path, json.dumps({"url": connection.url, "key": connection.key}, indent=2) + "\n")
    return path


def write_private(path: Path, text: str) -> None:
    """A file with mode 0600 from its first byte on, put in place by a rename."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)


def _saved() -> Connection | None:
    path = config_path()
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return Connection(content["url"].rstrip("/"), content["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(
            f"{path} cannot be read ({error}).", "Delete it; `seuf up` writes it anew."
        ) from error


def connect(url: str | None, key: str | None) -> Client:
    """A client for the service the user means.

    The saved key is used for the saved address only: it is never sent to another server.
    """
    from client import Client

    saved = _saved()
    url = (url or (saved.url if saved else DEFAULT_URL)).rstrip("/")
    if key is None and saved is not None and saved.url == url:
        key = saved.key
    if key is None:
        raise CommandError(
            f"There is no API key for {url}.",
            "Start a service with `seuf up`, or give a key with --key or SEUF_API_KEY.",
        )
    return Client(url, key)
