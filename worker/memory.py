"""How much main memory an engine holds: all processes of its group together."""

import os
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def held_bytes(group: int) -> int:
    """Anonymous and shared memory in bytes of every process in the process group `group`.

    Mapped files are not in it: the kernel drops them when it needs the room. A page that a child shares with its
    parent counts twice. 0 where there is no /proc.
    """
    total = 0
    with suppress(OSError):
        for entry in os.scandir(_PROC):
            if entry.name.isdecimal():
                total += _of(int(entry.name), group)
    return total


def _of(pid: int, group: int) -> int:
    """0 for a process of another group, or one that has just ended."""
    try:
        if os.getpgid(pid) != group:
            return 0
        lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
