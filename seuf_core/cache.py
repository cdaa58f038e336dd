"""Where this user's cache lies: what can be made again, kept so that it need not be. Torch-free."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """SEUF_CACHE if set, else `seuf` in the platform's cache folder (~/.cache or XDG_CACHE_HOME on Linux)."""
    if os.environ.get("SEUF_CACHE"):
        return Path(os.environ["SEUF_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "seuf"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "seuf" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seuf"
