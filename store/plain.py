"""JSON that both databases and every reader accept.

NaN and infinity, which a broken model produces, become null; the NUL character, which Postgres
refuses, is dropped.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: float | None) -> float | None:
    """The number, or None if it is not one."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A copy: floats finite or None, strings without NUL, mappings as dict, sequences as list."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    return value
