"""Checkpoints: what a job made. Manifest, files by range, and the few tensors that changed."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from api import schemas
from api.context import Service, TheCaller, TheService, needs
from api.docs import problems
from api.problems import Problem
from api.ranges import ServedFile, serve
from store.checkpoints import Checkpoints, artefact_key
from store.tables import Checkpoint

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])

MANIFEST: Final = "manifest.json"
DELTA: Final = "delta.safetensors"
_BYTES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The whole file."},
    206: {"content": {"application/octet-stream": {}}, "description": "The range asked for."},
    304: {"description": "The file of this ETag."},
}


@router.get("/{checkpoint_id}", dependencies=[needs("checkpoints:read")], responses=problems(404))
def get_checkpoint(checkpoint_id: str, service: TheService, caller: TheCaller) -> schemas.Checkpoint:
    """A checkpoint's manifest: its files with sizes and digests, its base model, and what changed."""
    row = _find(service, caller.tenant, checkpoint_id)
    files = list(_files(service, row).values())
    here = f"/checkpoints/{row.id}"
    return schemas.Checkpoint(
        id=row.id,
        job=row.job_id,
        created_at=row.created_at,
        bytes=sum(file.bytes for file in files),
        files=[schemas.CheckpointFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in files],
        manifest=row.manifest,
        links={
            "self": here,
            "files": f"{here}/files",
            "delta": f"{here}/delta",
            "job": f"/jobs/{row.job_id}",
        },
    )


@router.head(
    "/{checkpoint_id}/files/{name:path}", dependencies=[needs("checkpoints:read")], include_in_schema=False
)
@router.get(
    "/{checkpoint_id}/files/{name:path}",
    dependencies=[needs("checkpoints:read")],
    response_class=Response,
    responses={**_BYTES, **problems(404, 416)},
)
def get_checkpoint_file(
    checkpoint_id: str, name: str, request: Request, service: TheService, caller: TheCaller
) -> Response:
    """One file of the manifest. Strong ETag = its sha256; Range with If-Range resumes a download."""
    row = _find(service, caller.tenant, checkpoint_id)
    return serve(request, _named(service, row, name))


@router.head("/{checkpoint_id}/delta", dependencies=[needs("checkpoints:read")], include_in_schema=False)
@router.get(
    "/{checkpoint_id}/delta",
    dependencies=[needs("checkpoints:read")],
    response_class=Response,
    responses={**_BYTES, **problems(404, 416)},
)
def get_delta(checkpoint_id: str, request: Request, service: TheService, caller: TheCaller) -> Response:
    """Only the tensors that changed (safetensors): megabytes where the checkpoint has gigabytes."""
    row = _find(service, caller.tenant, checkpoint_id)
    return serve(request, _named(service, row, DELTA))


def _find(service: Service, tenant: str, checkpoint_id: str) -> Checkpoint:
    with service.database.read() as session:
        return Checkpoints(session, tenant).get(checkpoint_id)


def _named(service: Service, row: Checkpoint, name: str) -> ServedFile:
    """The file of this name; only names that the manifest lists exist, so none leads out of the folder."""
    file = _files(service, row).get(name)
    if file is None:
        raise Problem(
            404,
            "checkpoint_file_not_found",
            f"{row.id} has no file {name!r}.",
            f"GET /checkpoints/{row.id} lists its files.",
        )
    return file


def _files(service: Service, row: Checkpoint) -> dict[str, ServedFile]:
    """By name: every file of the manifest, and the manifest itself, last as it was written."""
    root = artefact_key(row.id)
    files = {
        entry["name"]: ServedFile(
            partial(service.artefacts.open_read, f"{root}/{entry['name']}"),
            entry["name"],
            entry["bytes"],
            entry["sha256"],
        )
        for entry in row.manifest["files"]
    }
    # The manifest cannot hold its own digest; it is a few kilobytes, so it is read for it.
    opened = partial(service.artefacts.open_read, f"{root}/{MANIFEST}")
    with opened() as stream:
        content = stream.read()
    files[MANIFEST] = ServedFile(opened, MANIFEST, len(content), hashlib.sha256(content).hexdigest())
    return files
