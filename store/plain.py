"""JSON that every reader accepts: NaN and infinity, which a broken model produces, become null."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: float | None) -> float | None:
    """The number, or None if it is not one."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A copy of JSON data with every float finite or None, mappings as dict, sequences as list."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return value
