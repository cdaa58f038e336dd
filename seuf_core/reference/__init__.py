"""A small real MoE that this project trains itself, on real facts of three domains, in about a minute.

`build` returns a folder in the user's cache: a model that knows the facts, the forget set (chemistry), the
retain set (geography and persons), probes in phrasings that training never used, and a report of what it
knows. With `twin=True` the same recipe is trained without chemistry: what a model looks like that never knew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seuf_core.reference.builder import Reference, build

__all__ = ["Reference", "build"]


def __getattr__(name: str) -> Any:  # lazy: importing this package must not import torch
    if name in __all__:
        from seuf_core.reference import builder

        return getattr(builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
