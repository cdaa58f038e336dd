"""`seuf keys` and `seuf tenants` on a database, as its holder has them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cli.errors import CommandError
from cli.keys import when
from store import migrate
from store.audit import Audit
from store.database import Database
from store.keys import authenticate

SECRET = "a secret of this test, long enough for anybody"


@pytest.fixture
def seuf(shell: Any) -> Any:
    """Runs a command on a migrated database; its JSON, or the process where it fails."""
    url = f"sqlite:///{shell.home / 'seuf.db'}"
    migrate.upgrade(url)

    def run(*arguments: str) -> Any:
        done = shell.run(*arguments, "--json", SEUF_DATABASE_URL=url, SEUF_SECRET=SECRET)
        return json.loads(done.stdout) if done.returncode == 0 else done

    run.database = Database(url)  # type: ignore[attr-defined]
    return run


def test_keys_are_made_rotated_and_revoked(seuf: Any) -> None:
    made = seuf("keys", "create", "--name", "ci", "--scope", "jobs:read", "--expires", "90d")
    assert made["scopes"] == ["jobs:read"]
    ends = datetime.fromisoformat(made["expires_at"])
    assert timedelta(days=89) < ends - datetime.now(UTC) <= timedelta(days=90)
    new = seuf("keys", "rotate", made["id"], "--overlap", "30m")
    assert new["scopes"] == ["jobs:read"]
    assert seuf("keys", "revoke", new["id"])["revoked"] is True
    rows = {row["id"]: row for row in seuf("keys", "list")}
    assert (rows[made["id"]]["state"], rows[made["id"]]["rotated_to"]) == ("valid", new["id"])
    assert rows[new["id"]]["state"] == "revoked"
    assert made["key"] not in str(rows)
    with seuf.database.read() as session:
        assert authenticate(session, made["key"], SECRET.encode()) is not None
        assert authenticate(session, new["key"], SECRET.encode()) is None
        logged = [(row.who, row.what) for row in Audit(session).list()]
    assert logged == [("cli", "key.create"), ("cli", "key.rotate"), ("cli", "key.revoke")]


def test_what_cannot_be_is_said_in_a_line(seuf: Any) -> None:
    for arguments, says in {
        ("keys", "revoke", "key_nobody"): "There is no key 'key_nobody'",
        ("keys", "create", "--name", "a", "--scope", "jobs:rule"): "There is no scope 'jobs:rule'",
        ("keys", "create", "--name", "a", "--tenant", "acme"): "There is no tenant 'acme'",
        ("keys", "create", "--name", "a", "--expires", "2020-01-01T00:00Z"): "has passed",
        ("keys", "create", "--name", "a", "--expires", "tomorrow"): "is no time",
        ("tenants", "create", "Acme"): "is no name of a tenant",
        ("tenants", "set", "default", "--max-active-jobs", "-1"): "is no number",
    }.items():
        done = seuf(*arguments)
        assert (done.returncode, done.stderr.startswith("error: ")) == (1, True), done.stderr
        assert says in done.stderr


def test_tenants_have_limits_and_keys_of_their_own(seuf: Any) -> None:
    seuf("tenants", "create", "acme", "--max-active-jobs", "4", "--requests-per-minute", "0")
    made = seuf("keys", "create", "--name", "first", "--tenant", "acme")
    with seuf.database.read() as session:
        found = authenticate(session, made["key"], SECRET.encode())
        assert found is not None
        assert (found.tenant, found.scopes) == ("acme", ["admin"])
    assert [row["id"] for row in seuf("keys", "list", "--tenant", "acme")] == [made["id"]]
    assert seuf("keys", "list") == []
    assert seuf("keys", "revoke", made["id"]).returncode == 1  # of another tenant: not there
    seuf("tenants", "set", "acme", "--max-active-jobs", "default", "--max-stored-bytes", "5000000")
    acme, default = seuf("tenants", "list")
    assert acme == {
        "tenant": "acme",
        "active_jobs": 0,
        "max_active_jobs": 1000,
        "stored_bytes": 0,
        "max_stored_bytes": 5_000_000,
        "requests_per_minute": 0,
    }
    assert (default["tenant"], default["max_stored_bytes"]) == ("default", 1 << 40)


@pytest.mark.parametrize("text", ["1x", "d", "-5d", "2027-01-31T12:00", "99999999d", ""])
def test_times_that_say_nothing(text: str) -> None:
    with pytest.raises(CommandError):
        when(text)


def test_times() -> None:
    assert when("2027-01-31T12:00+02:00") == datetime(2027, 1, 31, 10, tzinfo=UTC)
    assert when(None) is None
