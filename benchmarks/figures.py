"""What was measured, by name, with the machine it was measured on: the one form of every JSON in docs/results.

{"environment": {...}, "figures": [{"name": "attribution/olmoe-1b-7b/resident/load", "value": 9.1, "unit": "s"}, ...]}
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Figures:
    """Figures by name, in the order they were added. A name is a path: `part/model/what/...`."""

    def __init__(self, environment: Mapping[str, Any] | None = None) -> None:
        self.environment = dict(environment or {})
        self._rows: dict[str, tuple[float, str]] = {}

    def add(self, name: str, value: float, unit: str) -> None:
        """One figure, to six digits; whole numbers as they are. An older one of the same name is replaced."""
        self._rows[name] = (value if isinstance(value, int) else float(f"{value:.6g}"), unit)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> float:
        return self._rows[name][0]

    def get(self, name: str) -> float | None:
        """The value, or None where it was not measured."""
        return self._rows[name][0] if name in self._rows else None

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Forget every figure whose name begins with one of these."""
        self._rows = {name: row for name, row in self._rows.items() if not name.startswith(prefixes)}

    def names(self, prefix: str = "") -> list[str]:
        """The names that begin so."""
        return [name for name in self._rows if name.startswith(prefix)]

    def values(self) -> dict[str, float]:
        """Every value by name."""
        return {name: value for name, (value, _) in self._rows.items()}

    def units(self) -> dict[str, str]:
        """Every unit by name."""
        return {name: unit for name, (_, unit) in self._rows.items()}

    def take(self, other: Figures) -> None:
        """Add every figure of another run."""
        self._rows |= other._rows

    def write(self, path: Path) -> None:
        """The JSON, whole or not at all."""
        rows = [{"name": name, "value": value, "unit": unit} for name, (value, unit) in self._rows.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"environment": self.environment, "figures": rows}, indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Figures:
        """The inverse of `write`."""
        content = json.loads(path.read_text())
        figures = cls(content["environment"])
        for row in content["figures"]:
            figures.add(row["name"], row["value"], row["unit"])
        return figures


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    import torch  # here: the demo starts without
    import transformers

    found = {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "device": "cpu",
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
