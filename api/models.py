"""Models: folders of safetensors on the machine of the service, looked at before they are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy.exc import IntegrityError

from api import schemas, views
from api.context import TheCaller, TheService, audit, needs
from api.docs import problems
from api.idempotency import TheOnce
from api.problems import at, from_seuf_error
from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.errors import ModelError
from store.errors import NameTakenError
from store.models import Models

router = APIRouter(prefix="/models", tags=["models"])


@router.post(
    "",
    dependencies=[needs("models:write")],
    status_code=201,
    response_model=schemas.Model,
    responses=problems(400, 409, 413, 422),
)
def register_model(
    body: schemas.ModelCreate, service: TheService, caller: TheCaller, once: TheOnce
) -> Response:
    """Register a model folder: safetensors of a known Mixture-of-Experts family, or of a dense model.

    Only headers are read, so this takes milliseconds at any size. Code in the folder is never run.
    """
    path = _allowed(body.path, service.settings.model_roots)
    try:
        facts = inspect_model(path)
    except ModelError as error:
        raise from_seuf_error(error, "/path") from error
    except PermissionError as error:
        name = Path(str(error.filename)).name
        raise at(
            "/path",
            422,
            "model_not_readable",
            f"The service may not read {name} in that folder.",
            "Let the user that the service runs as (10001 in the images) read the folder and its files.",
        ) from error
    with service.database.write() as session:
        try:
            row = Models(session, caller.tenant).create(
                body.name, str(path), facts.digest, views.model_facts(facts)
            )
        except (NameTakenError, IntegrityError) as error:  # the second: two requests at the same moment
            detail = f"A model named {body.name!r} is registered already."
            raise at("/name", 409, "name_taken", detail, "Choose another name.") from error
        audit(session, caller, "model.create", row.id)
        return once.answer(session, 201, views.model(row), {"Location": f"/models/{row.id}"})


def _allowed(given: str, roots: tuple[Path, ...]) -> Path:
    """The folder behind `given`, links followed, if it lies under an allowed root."""
    if not given.startswith("/") or "\0" in given:
        raise at(
            "/path", 422, "path_not_absolute", f"{given!r} is not an absolute path.", "Give it from / on."
        )
    path = Path(given).resolve()
    if roots and not any(path.is_relative_to(root.resolve()) for root in roots):
        # The same answer whether the folder exists or not: a caller cannot look around with it.
        raise at(
            "/path",
            422,
            "path_not_allowed",
            "The path lies outside the folders models may be registered from.",
            "Move the model there, or add its folder to SEUF_MODEL_ROOTS.",
        )
    return path


@router.get("", dependencies=[needs("models:read")], responses=problems(422))
def list_models(
    service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[schemas.Model]:
    """The registered models, newest first."""
    with service.database.read() as session:
        page = Models(session, caller.tenant).list(query.cursor, query.limit)
    return views.page(page, views.model)


@router.get("/{id_or_name}", dependencies=[needs("models:read")], responses=problems(404))
def get_model(id_or_name: str, service: TheService, caller: TheCaller) -> schemas.Model:
    """One model, by id or name."""
    with service.database.read() as session:
        return views.model(Models(session, caller.tenant).get(id_or_name))
