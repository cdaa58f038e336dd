"""Checkpoints: what a job made. Manifest, files by range, and the few tensors that changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
    307: {
        "description": "The object store has the bytes. `Location` is signed and opens them for a minute, without "
        "the key of this service: send `Range` there too, and never `Authorization`."
    },
}


@router.get("/{checkpoint_id}", dependencies=[needs("checkpoints:read")], responses=problems(404))
def get_checkpoint(checkpoint_id: str, service: TheService, caller: TheCaller) -> schemas.Checkpoint:
    """A checkpoint's manifest: its files with sizes and digests, its base model, and what changed."""
    row = _find(service, caller.tenant, checkpoint_id)
    files = [
        schemas.CheckpointFile(name=file.name, bytes=file.bytes, sha256=file.sha256)
        for file in (*_listed(service, row), _manifest(service, row))
    ]
    here = f"/checkpoints/{row.id}"
    return schemas.Checkpoint(
        id=row.id,
        job=row.job_id,
        created_at=row.created_at,
        bytes=sum(file.bytes for file in files),
        files=files,
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
    if name == MANIFEST:
        return _manifest(service, row)
    for file in _listed(service, row):
        if file.name == name:
            return file
    raise Problem(
        404,
        "checkpoint_file_not_found",
        f"{row.id} has no file {name!r}.",
        f"GET /checkpoints/{row.id} lists its files.",
    )


def _listed(service: Service, row: Checkpoint) -> Iterator[ServedFile]:
    for entry in row.manifest["files"]:
        yield _served(service, row, entry["name"], entry["bytes"], entry["sha256"])


def _manifest(service: Service, row: Checkpoint) -> ServedFile:
    """The manifest cannot hold its own digest; it is a few kilobytes, so it is read for it."""
    with service.artefacts.open_read(f"{artefact_key(row.id)}/{MANIFEST}") as stream:
        content = stream.read()
    return _served(service, row, MANIFEST, len(content), hashlib.sha256(content).hexdigest())


def _served(service: Service, row: Checkpoint, name: str, size: int, sha256: str) -> ServedFile:
    key, settings = f"{artefact_key(row.id)}/{name}", service.settings

    def signed_url(headers: dict[str, str]) -> str | None:
        if not settings.s3_redirect:
            return None
        return service.artefacts.signed_url(key, settings.s3_redirect_seconds, headers)

    return ServedFile(partial(service.artefacts.open_read, key), signed_url, name, size, sha256)
