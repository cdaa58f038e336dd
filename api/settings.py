"""Settings of the API process: those of the store, and what only HTTP needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from store.settings import Settings


class ApiSettings(Settings):
    """Read once at start from SEUF_... like all settings."""

    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folders that models may be registered from, separated as in PATH; empty: any folder "
        "the service can read, which is right on one's own machine only.",
    )

    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names that a request may have in its Host header, separated by commas; empty: any. Health checks "
        "and metrics need theirs in it too.",
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, str):
            return tuple(name.strip() for name in given.split(",") if name.strip())
        return given

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        if isinstance(given, str):
            return tuple(Path(part) for part in given.split(os.pathsep) if part)
        return given
