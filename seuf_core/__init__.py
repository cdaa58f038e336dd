"""Selected-expert unlearning for Mixture-of-Experts language models: the library.

    from seuf_core import Method, attribute, unlearn

Importing this package loads no torch: the names below are looked up when they are first used, so that the
torch-free modules (`method`, `errors`, `data.records`, `checkpoint.inspect`) stay cheap for the HTTP side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seuf_core.version import __version__

if TYPE_CHECKING:
    from seuf_core.method import Method as Method
    from seuf_core.pipeline import Attributed as Attributed
    from seuf_core.pipeline import UnlearnResult as UnlearnResult
    from seuf_core.pipeline import attribute_only as attribute
    from seuf_core.pipeline import unlearn as unlearn

__all__ = ["Attributed", "Method", "UnlearnResult", "__version__", "attribute", "unlearn"]

_IN_PIPELINE = {
    "Attributed": "Attributed",
    "UnlearnResult": "UnlearnResult",
    "attribute": "attribute_only",
    "unlearn": "unlearn",
}


def __getattr__(name: str) -> Any:
    if name == "Method":
        from seuf_core.method import Method

        return Method
    if name in _IN_PIPELINE:
        from seuf_core import pipeline

        return getattr(pipeline, _IN_PIPELINE[name])
    raise AttributeError(f"module 'seuf_core' has no attribute {name!r}")
