"""How much memory a job may use on this machine, and on which device: what is given, else what is left.

Torch-free; Linux, and elsewhere what sysconf says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from seuf_core.errors import MethodError
from seuf_core.plan.facts import USABLE, Machine, ModelShape

MEMORY_VARIABLE = "SEUF_MEMORY"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def machine(memory: int | str | None = None, devices: dict[str, int] | None = None) -> Machine:
    """This machine.

    Args:
        memory: what a job may use, in bytes or as a text such as "6GB"; None = SEUF_MEMORY, else what is free.
        devices: name -> bytes that may be used of each accelerator.

    Raises:
        MethodError: `not_a_size`.
    """
    if memory is None:
        memory = os.environ.get(MEMORY_VARIABLE) or None
    free, limit = min(_free(), key=lambda found: found[0])
    if memory is not None:
        return Machine(parse_size(memory), "what was given", devices or {}, free)
    return Machine(int(USABLE * free), f"{USABLE:.0%} of {limit}", devices or {}, free)


@dataclass(frozen=True)
class Device:
    """Where a job computes: torch's name of it, why there, and how many bytes of weights and activations it may have.

    limit: where that figure comes from, in words.
    """

    name: str
    why: str
    memory: int
    limit: str


def choose_device(shape: ModelShape, on: Machine) -> Device:
    """The accelerator with the most free memory, if a layer and the embeddings fit there; else the CPU."""
    if not on.devices:
        return Device("cpu", "no accelerator is there", on.memory, on.limit)
    name, free = max(on.devices.items(), key=lambda one: one[1])
    least = shape.outside_bytes + shape.largest_layer
    if free < least:
        why = f"{name} has {gigabytes(free)}, and a layer with the embeddings needs {gigabytes(least)}"
        return Device("cpu", why, on.memory, on.limit)
    why = f"it has the most free memory of {len(on.devices)}: {gigabytes(free)}"
    return Device(name, why, free, f"{USABLE:.0%} of what is free on {name}")


def gigabytes(size: int) -> str:
    """Such as `1.50 GB`."""
    return f"{size / 1e9:.2f} GB"


def parse_size(text: int | str) -> int:
    """Bytes of a number or a text such as `6GB`, `1.5 GiB`, `500MB`.

    Raises:
        MethodError: `not_a_size`.
    """
    if isinstance(text, int):
        return text
    found = _SIZE.fullmatch(text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) == 0:
        raise MethodError(
            "not_a_size", f"{text!r} is no size of memory.", "Write it as 6GB, 1.5GiB or a number of bytes."
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _free() -> list[tuple[int, str]]:
    """What each limit leaves, and its name."""
    found = [(_meminfo("MemAvailable") or _physical(), "what is free on this machine")]
    if (left := _left_in_group()) is not None:
        found.append((left, "what the control group leaves"))
    return found


def _meminfo(field: str) -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Limit minus anonymous memory in use, of control group version 2 or 1; None without a limit.

    Page cache counts against a limit but gives way, so it does not count here.
    """
    for limit, stat, anonymous in (
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        try:
            most = int((root / limit).read_text(encoding="ascii"))
            used = dict(line.split() for line in (root / stat).read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # "max" is no number
            continue
        if most < _physical():
            return max(0, most - int(used.get(anonymous, 0)))
    return None
