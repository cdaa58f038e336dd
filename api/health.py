"""Is the process alive, and what can this service do."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter

from api.context import TheCaller, TheService, needs
from api.docs import problems
from api.jobs import INLINE_BYTES
from seuf_core import method
from seuf_core.data.records import Limits
from seuf_core.families import FAMILIES
from seuf_core.version import __version__

public = APIRouter(tags=["service"])
router = APIRouter(tags=["service"])


@public.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/capabilities", dependencies=[needs("jobs:read")], responses=problems())
def capabilities(service: TheService, _caller: TheCaller) -> dict[str, Any]:
    """What this service can do: architectures, the choices of a method with their presets, and its limits."""
    limits = Limits()
    return {
        "version": __version__,
        "architectures": sorted(FAMILIES),
        "presets": method.PRESETS,
        "objectives": list(get_args(method.Objective)),
        "scopes": list(get_args(method.Scope)),
        "attributions": list(get_args(method.Attribution)),
        "spreads": list(get_args(method.Spread)),
        "router_modes": list(get_args(method.RouterMode)),
        "retain_losses": list(get_args(method.RetainLoss)),
        "lane": service.settings.lane,
        "limits": {
            "upload_bytes": service.settings.max_upload_bytes,
            "upload_part_bytes": service.settings.upload_part_bytes,
            "file_bytes": service.settings.max_file_bytes,
            "line_bytes": limits.max_line_bytes,
            "examples": limits.max_examples,
            "inline_bytes": INLINE_BYTES,
            "job_seconds": service.settings.max_job_seconds,
            "job_memory_bytes": service.settings.max_job_memory_bytes or None,
        },
        "method_schema": method.Method.model_json_schema(),
    }
