"""API keys: shown once, kept as an HMAC."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from store import keys, scopes
from store.database import Database
from store.errors import (
    ExpiryRefusedError,
    KeyEndedError,
    MissingScopeError,
    NotFoundError,
    TooManyKeysError,
    UnknownScopeError,
)
from store.keys import Keys, authenticate, well_formed
from store.tables import now
from tests.seeds import everything
from tests.services import wait_until

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


def test_a_key_ends_when_it_says(database: Database) -> None:
    with database.write() as session:
        made = Keys(session).create("a", SECRET, expires_at=now() + timedelta(hours=1))
        assert authenticate(session, made.token, SECRET) is not None
        made.row.expires_at = now()
        session.flush()
        assert authenticate(session, made.token, SECRET) is None
        with pytest.raises(ExpiryRefusedError):
            Keys(session).create("a", SECRET, expires_at=now() - timedelta(seconds=1))


def test_scopes_are_known_ones(database: Database) -> None:
    with database.write() as session:
        made = Keys(session).create("a", SECRET, ["jobs:read", "files:read", "jobs:read"])
        assert made.row.scopes == ["files:read", "jobs:read"]
        for wrong in (["jobs:rule"], []):
            with pytest.raises(UnknownScopeError):
                Keys(session).create("a", SECRET, wrong)


def test_nobody_hands_on_more_than_they_have() -> None:
    scopes.check_covers(["files:read", "keys:write"], ["files:read"])
    scopes.check_covers([scopes.ADMIN], [*scopes.SCOPES])
    for more in (["files:write"], [scopes.ADMIN], ["files:read", "jobs:read"]):
        with pytest.raises(MissingScopeError):
            scopes.check_covers(["files:read", "keys:write"], more)


def test_rotation_overlaps(database: Database) -> None:
    ends = now() + timedelta(days=30)
    with database.write() as session:
        old = Keys(session).create("ci", SECRET, ["jobs:read"], ends)
    with database.write() as session:
        new = Keys(session).rotate(old.row.id, SECRET, timedelta(hours=1))
        assert (new.row.name, new.row.scopes, new.row.expires_at) == ("ci", ["jobs:read"], ends)
        for token in (old.token, new.token):
            assert authenticate(session, token, SECRET) is not None
        row = Keys(session).get(old.row.id)
        assert row.rotated_to == new.row.id
        assert row.expires_at is not None
        assert timedelta(minutes=59) < row.expires_at - now() <= timedelta(hours=1)
        with pytest.raises(KeyEndedError, match=new.row.id):
            Keys(session).rotate(old.row.id, SECRET, timedelta(hours=1))
        last = Keys(session).rotate(new.row.id, SECRET, timedelta(0))
        assert authenticate(session, new.token, SECRET) is None
        assert authenticate(session, last.token, SECRET) is not None
        Keys(session).revoke(last.row.id)
        with pytest.raises(KeyEndedError, match="revoked"):
            Keys(session).rotate(last.row.id, SECRET, timedelta(hours=1))


def test_an_overlap_does_not_make_a_key_live_longer(database: Database) -> None:
    ends = now() + timedelta(minutes=5)
    with database.write() as session:
        old = Keys(session).create("ci", SECRET, expires_at=ends)
        Keys(session).rotate(old.row.id, SECRET, timedelta(days=1), now() + timedelta(days=90))
        assert Keys(session).get(old.row.id).expires_at == ends


def test_two_who_rotate_at_once_make_one_successor(database: Database) -> None:
    with database.write() as session:
        old = Keys(session).create("ci", SECRET)
    refused = list[str]()

    def rotate() -> None:
        try:
            with database.write() as session:
                Keys(session).rotate(old.row.id, SECRET, timedelta(hours=1))
        except KeyEndedError as error:
            refused.append(error.message)

    second = threading.Thread(target=rotate)
    with database.write() as session:
        Keys(session).rotate(old.row.id, SECRET, timedelta(hours=1))
        second.start()
        if not database.is_sqlite:  # (there it waits to begin)
            wait_until(lambda: _waits(database), 10, "the second one to wait for the first")
    second.join()
    assert len(refused) == 1
    with database.read() as session:
        assert len(Keys(session).list().data) == 2


def _waits(database: Database) -> bool:
    """Does somebody wait for a lock in this Postgres database? (In a transaction of its own: each sees one moment.)"""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with database.read() as session:
        return bool(session.execute(text(query)).scalar_one())


def test_valid_keys_are_limited(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_KEYS", 2)
    with database.write() as session:
        first = Keys(session).create("a", SECRET)
        Keys(session).create("b", SECRET, expires_at=now() + timedelta(hours=1))
        Keys(session, "theirs").create("c", SECRET)
        with pytest.raises(TooManyKeysError):
            Keys(session).create("d", SECRET)
        Keys(session).revoke(first.row.id)
        Keys(session).create("d", SECRET)
