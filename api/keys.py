"""Keys: made with some of the scopes of the key in use, rotated with an overlap, revoked."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final, Literal

from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime, ConfigDict, Field

from api import schemas, views
from api.context import Caller, TheCaller, TheService, audit, needs
from api.docs import problems
from api.idempotency import TheOnce
from store.errors import ExpiryRefusedError
from store.keys import Keys, NewKey
from store.scopes import SCOPES, check_covers
from store.tables import ApiKey

router = APIRouter(prefix="/keys", tags=["keys"])

KEY_ID: Final = "key_a2b3c4d5e6f7g2h3i4j5"
_TIME: Final = "2027-11-24T06:00:00Z"
_NEVER_AGAIN: Final = (
    "A replay by Idempotency-Key has null here, since no key is ever stored: if the first answer was lost, rotate the "
    "key with an overlap of 0."
)
if TYPE_CHECKING:
    ScopeName = str
else:
    ScopeName = Literal[tuple(SCOPES)]  # the names are data, in one place


class KeyCreate(schemas.Body):
    """A key to make."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "ci", "scopes": ["files:write", "jobs:write"], "expires_at": _TIME}]
        }
    )
    name: schemas.Text = Field(min_length=1, max_length=200, description="What the key is for.")
    scopes: list[ScopeName] = Field(
        min_length=1,
        max_length=len(SCOPES),
        description="What it may do: " + "; ".join(f"`{name}` {what}" for name, what in SCOPES.items()) + ".",
    )
    expires_at: AwareDatetime | None = Field(
        None,
        description="From then on it opens nothing; null: as the key in use, which it cannot outlive.",
    )


class KeyRotate(schemas.Body):
    """How to rotate a key."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_seconds": 3600}]})
    overlap_seconds: int = Field(
        86_400,
        ge=0,
        le=30 * 86_400,
        description="Seconds that the old key goes on, to replace it everywhere.",
    )
    expires_at: AwareDatetime | None = Field(
        None, description="End of the new key; null: that of the old one."
    )


class Key(schemas.Answer):
    """A key, without the key itself."""

    id: str = Field(examples=[KEY_ID])
    object: Literal["key"] = "key"
    name: str = Field(examples=["ci"])
    begins: str = Field(description="How it begins, to recognise it.", examples=["seuf_ab3d5f7h"])
    scopes: list[str] = Field(examples=[["files:write", "jobs:write"]])
    created_at: schemas.UtcTime
    expires_at: schemas.UtcTime | None
    revoked_at: schemas.UtcTime | None
    rotated_to: str | None = Field(description="Id of the key that takes its place.")


class KeyMade(Key):
    """A fresh key."""

    token: str | None = Field(
        description=f"The key, shown this once. {_NEVER_AGAIN}", examples=["seuf_" + "ab3d5f7h" * 7 + "ij"]
    )


@router.post(
    "",
    dependencies=[needs("keys:write")],
    status_code=201,
    response_model=KeyMade,
    responses=problems(400, 409, 413, 422),
)
def create_key(body: KeyCreate, service: TheService, caller: TheCaller, once: TheOnce) -> Response:
    """Make a key for this tenant, with scopes that the key in use has itself. It is shown once."""
    expires_at = body.expires_at or caller.expires_at
    _check_end(caller, expires_at)
    check_covers(caller.scopes, body.scopes)
    with service.database.write() as session:
        secret = service.settings.secret_bytes()
        made = Keys(session, caller.tenant).create(body.name, secret, body.scopes, expires_at)
        audit(session, caller, "key.create", made.row.id)
        answer = _made(made)
        headers = {"Location": f"/keys/{made.row.id}"}
        return once.answer(session, 201, answer, headers, kept=answer.model_copy(update={"token": None}))


@router.get("", dependencies=[needs("keys:read")], responses=problems(422))
def list_keys(
    service: TheService, caller: TheCaller, query: Annotated[schemas.ListQuery, Query()]
) -> schemas.Page[Key]:
    """The keys of this tenant, newest first, revoked and expired ones too."""
    with service.database.read() as session:
        page = Keys(session, caller.tenant).list(query.cursor, query.limit)
    return views.page(page, _key)


@router.get("/{key_id}", dependencies=[needs("keys:read")], responses=problems(404))
def get_key(key_id: str, service: TheService, caller: TheCaller) -> Key:
    """One key."""
    with service.database.read() as session:
        return _key(Keys(session, caller.tenant).get(key_id))


@router.post(
    "/{key_id}/rotate",
    dependencies=[needs("keys:write")],
    status_code=201,
    response_model=KeyMade,
    responses=problems(400, 404, 409, 413, 422),
)
def rotate_key(
    key_id: str, body: KeyRotate, service: TheService, caller: TheCaller, once: TheOnce
) -> Response:
    """A new key in the place of this one: same name, same scopes. The old one goes on for the overlap."""
    with service.database.write() as session:
        keys = Keys(session, caller.tenant)
        old = keys.get(key_id)
        check_covers(caller.scopes, old.scopes)
        _check_end(caller, body.expires_at or old.expires_at)
        overlap = timedelta(seconds=body.overlap_seconds)
        made = keys.rotate(key_id, service.settings.secret_bytes(), overlap, body.expires_at)
        audit(session, caller, "key.rotate", key_id)
        answer = _made(made)
        headers = {"Location": f"/keys/{made.row.id}"}
        return once.answer(session, 201, answer, headers, kept=answer.model_copy(update={"token": None}))


@router.delete("/{key_id}", dependencies=[needs("keys:write")], status_code=204, responses=problems(404))
def revoke_key(key_id: str, service: TheService, caller: TheCaller) -> None:
    """Revoke a key: within seconds it opens nothing, here and in every other process. Asking twice is harmless."""
    with service.database.write() as session:
        keys = Keys(session, caller.tenant)
        check_covers(caller.scopes, keys.get(key_id).scopes)
        keys.revoke(key_id)
        audit(session, caller, "key.revoke", key_id)


def _check_end(caller: Caller, wanted: datetime | None) -> None:
    """A key that ends cannot make one that goes on longer: who steals it would keep what they stole."""
    if caller.expires_at is not None and (wanted is None or wanted > caller.expires_at):
        raise ExpiryRefusedError(
            f"The key in use ends at {caller.expires_at:%Y-%m-%d %H:%M} UTC; what it makes cannot go on longer.",
            "Name an earlier time, or use a key that lasts longer.",
        )


def _key(row: ApiKey) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        begins=row.prefix,
        scopes=row.scopes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        rotated_to=row.rotated_to,
    )


def _made(made: NewKey) -> KeyMade:
    return KeyMade(**_key(made.row).model_dump(), token=made.token)
