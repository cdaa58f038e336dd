"""API keys: shown once, kept as an HMAC."""

from __future__ import annotations

import pytest

from store import keys
from store.database import Database
from store.errors import NotFoundError
from store.keys import Keys, authenticate, well_formed
from tests.seeds import everything

SECRET = b"s" * 32


def test_a_key_opens_its_tenant_and_is_never_stored(database: Database) -> None:
    with database.write() as session:
        new = Keys(session, "ours").create("ci", SECRET)
    assert new.token.startswith(new.row.prefix)
    assert new.token[len(new.row.prefix) :] not in str(everything(database))
    with database.read() as session:
        found = authenticate(session, new.token, SECRET)
        assert found is not None
        assert (found.id, found.tenant, found.name) == (new.row.id, "ours", "ci")
        assert authenticate(session, new.token, b"another secret") is None


def test_shape_and_strength(database: Database) -> None:
    with database.write() as session:
        tokens = {Keys(session).create("a", SECRET).token for _ in range(5)}
    assert len(tokens) == 5
    for token in tokens:
        assert len(token) == 5 + 8 + 44 + 6
        assert well_formed(token)


def test_wrong_keys_open_nothing(database: Database) -> None:
    with database.write() as session:
        token = Keys(session).create("a", SECRET).token
        other = Keys(session).create("b", SECRET).token
    flipped = token[:20] + ("a" if token[20] != "a" else "b") + token[21:]
    assert not well_formed(flipped)  # a typo shows without a look in the database
    # The name of one key on the secret of another, with a right checksum.
    crossed = _with_checksum(token[:13] + other[13:57])
    assert well_formed(crossed)
    with database.read() as session:
        for wrong in ("", "seuf_", token[:-1], token + "a", token.upper(), flipped, crossed, "ü" * 63):
            assert authenticate(session, wrong, SECRET) is None, wrong


def _with_checksum(body: str) -> str:
    return body + keys._checksum(body)


def test_revoked_keys_open_nothing(database: Database) -> None:
    with database.write() as session:
        new = Keys(session).create("a", SECRET)
    with database.write() as session:
        Keys(session).revoke(new.row.id)
        first = Keys(session).list().data[0].revoked_at
    assert first is not None
    with database.write() as session:
        assert authenticate(session, new.token, SECRET) is None
        Keys(session).revoke(new.row.id)
        assert Keys(session).list().data[0].revoked_at == first
        with pytest.raises(NotFoundError):
            Keys(session).revoke("key_nobody")
