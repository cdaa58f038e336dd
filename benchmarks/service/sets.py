"""What jobs of a benchmark are about: small uploaded sets, and a tiny registered model."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.service.stage import Stage
from benchmarks.shapes import tiny_fields, write_shape

SHAPE = "olmoe-125m"


def prepare(service: Stage, examples: int = 24) -> dict[str, Any]:
    """Uploads sets and registers a tiny model; returns the body of a job on them."""
    model = service.folder / "model"
    write_shape(SHAPE, model, **tiny_fields(SHAPE))
    with service.client() as client:
        ids = {}
        for purpose in ("forget", "retain"):
            path = service.folder / f"{purpose}.jsonl"
            path.write_text("".join(f"{line}\n" for line in _lines(purpose, examples)))
            ids[purpose] = client.upload(path, purpose)["id"]  # type: ignore[arg-type]
        client.register_model("tiny", model)
    return {"model": "tiny", **{f"{purpose}_set": {"file": found} for purpose, found in ids.items()}}


def _lines(purpose: str, examples: int) -> list[str]:
    return [
        json.dumps({"prompt": f"t{number} t7 t{number + 3}", "completion": f" t{number} {purpose[0]}"})
        for number in range(3, 3 + examples)
    ]
