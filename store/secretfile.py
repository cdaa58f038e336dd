"""Secrets that a service on one machine makes for itself: a file for its owner only, made on first use."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def read_or_make(path: Path, make: Callable[[], bytes]) -> bytes:
    """The secret at `path`, mode 0600; made first if it is not there. Safe when two processes start at once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
        try:
            os.link(draft, path)  # fails if the other process was first: then its secret is the secret
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()
