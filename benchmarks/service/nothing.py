"""A job of no work, and a Celery task of no work: what is left is the machinery around them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from seuf_core.checkpoint.manifest import MANIFEST, BaseRef, FileEntry, Manifest, sha256_file


def entry(_model: Path, _forget: Path, out: Path, **_given: Any) -> Any:
    """What the engine calls in the place of seuf_core.unlearn: a checkpoint of one small file."""
    out.mkdir()
    (out / "nothing.json").write_text("{}")
    entry = FileEntry(name="nothing.json", bytes=2, sha256=sha256_file(out / "nothing.json"))
    manifest = Manifest(
        created_by="benchmark",
        base=BaseRef(digest="sha256:" + "0" * 64, model_type="olmoe"),
        files=(entry,),
        changed=(),
        parameters_changed=1,
        parameters_total=2,
    )
    (out / MANIFEST).write_text(manifest.to_json())
    return SimpleNamespace(attribution=None, selection=[], metrics=[], manifest=manifest)


if broker := os.environ.get("PLAIN_BROKER_URL"):
    from celery import Celery

    app = Celery("plain", broker=broker)
    app.conf.update(task_ignore_result=True, worker_concurrency=1, task_default_queue="plain")

    @app.task(name="nothing")  # type: ignore[untyped-decorator]
    def nothing() -> None:
        """Nothing at all."""
