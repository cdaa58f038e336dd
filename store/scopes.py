"""What a key may do: every scope there is. A route names the one that it needs (api.auth.needs)."""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from store.errors import MissingScopeError, UnknownScopeError

ADMIN: Final = "admin"
"""Holds every other scope, those of later releases too."""

SCOPES: Final[Mapping[str, str]] = {
    "files:read": "look at uploaded sets (never at their text)",
    "files:write": "upload and delete sets",
    "models:read": "look at registered models",
    "models:write": "register models",
    "jobs:read": "look at jobs, their events and what they measured",
    "jobs:write": "submit, cancel and retry jobs, and estimate them",
    "checkpoints:read": "download what jobs made",
    "webhooks:read": "look at webhooks and their deliveries",
    "webhooks:write": "make, change and delete webhooks",
    "audit:read": "read the audit log",
    "keys:read": "look at keys (never at the keys themselves)",
    "keys:write": "make, rotate and revoke keys that may do no more than the one in use",
    "metrics:read": "read the figures of all tenants together; only in the operator's tenant, `default`",
    ADMIN: "everything",
}


def allows(held: Collection[str], needed: str) -> bool:
    """May a key with the scopes `held` do what needs `needed`?"""
    return needed in held or ADMIN in held


def known(wanted: Iterable[str]) -> list[str]:
    """`wanted` in the order of SCOPES, each once. UnknownScopeError names one that does not exist."""
    given = set(wanted)
    if unknown := sorted(given - SCOPES.keys()):
        raise UnknownScopeError(f"There is no scope {unknown[0]!r}.", f"Scopes: {', '.join(SCOPES)}.")
    if not given:
        raise UnknownScopeError("A key without a scope could do nothing.", f"Scopes: {', '.join(SCOPES)}.")
    return [scope for scope in SCOPES if scope in given]


def check_covers(held: Collection[str], wanted: Iterable[str]) -> None:
    """MissingScopeError unless `held` allows each of `wanted`: nobody hands on more than they have."""
    lacking = [scope for scope in wanted if not allows(held, scope)]
    if lacking:
        raise MissingScopeError(
            f"The key in use does not have {', '.join(lacking)}, so it cannot give or take it.",
            "Leave it out, or use a key that has it.",
        )
