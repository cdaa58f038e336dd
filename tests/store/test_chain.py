"""The offline check of an audit log: every way to tamper with one is found, or shown here not to be findable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from store import chain
from store.chain import BrokenError, Head, Row, lines_of, verify

KEY = Ed25519PrivateKey.generate()
TRUSTED = {chain.key_id_of(KEY.public_key())}
BEGAN = datetime(2026, 11, 20, 6, tzinfo=UTC)


class Log:
    """A log written as the service writes it."""

    def __init__(self, key: Ed25519PrivateKey = KEY, tenant: str = "default") -> None:
        self.key, self.tenant = key, tenant
        self.rows: list[Row] = []
        self.heads: list[Head] = []

    def act(self, what: str = "job.create", object_id: str = "job_1", hours: float = 1) -> Log:
        """One more row, so many hours after the one before."""
        last = self.rows[-1] if self.rows else None
        at = datetime.fromisoformat(last.at) + timedelta(hours=hours) if last else BEGAN
        previous = last.hash if last else chain.START
        row = Row(
            self.tenant,
            len(self.rows) + 1,
            "key_1",
            what,
            object_id,
            "req_1",
            chain.written(at),
            previous,
            "",
        )
        self.rows.append(replace(row, hash=row.computed()))
        return self

    def sign(self, hours: float = 1) -> Log:
        """One more head, on a row of its own."""
        self.act(chain.SIGN, chain.key_id_of(self.key.public_key()), hours)
        self.heads.append(chain.sign(self.rows[-1], self.key))
        return self

    def export(self, all_heads: bool = False) -> list[bytes]:
        """As GET /audit/export."""
        lines = [*lines_of(self.rows, None)]
        return lines + [_line(head=head) for head in (self.heads if all_heads else self.heads[-1:])]


def _line(**named: Row | Head) -> bytes:
    ((kind, given),) = named.items()
    return json.dumps({kind: asdict(given)}).encode() + b"\n"


def a_log() -> Log:
    """Eight rows: 1 2 3 4(head) 5 6(head) 7 8."""
    return Log().act().act("file.delete", "file_2").act().sign().act().sign().act().act()


def broken(lines: list[bytes], **given: object) -> tuple[str, int | None]:
    with pytest.raises(BrokenError) as caught:
        verify(lines, **{"trusted": TRUSTED, **given})  # type: ignore[arg-type]
    return caught.value.code, caught.value.seq


def test_a_whole_log() -> None:
    log = a_log()
    found = verify(log.export(), trusted=TRUSTED)
    assert (found.rows, found.heads, found.unsigned, found.doubts) == (8, 1, 2, [])
    assert found.newest == log.heads[-1]
    assert verify(log.export(all_heads=True), trusted=TRUSTED, all_heads=True).heads == 2


def test_the_hash_is_what_anyone_would_compute() -> None:
    """Worked by hand: RFC 8785, then sha256sum."""
    row = Row("default", 1, "key_1", "job.create", "job_1", None, "2026-11-24T06:00:00.000000Z", "0" * 64, "")
    text = (
        '{"at":"2026-11-24T06:00:00.000000Z","object":"job_1","previous_hash":"' + "0" * 64 + '",'
        '"request_id":null,"seq":1,"tenant":"default","what":"job.create","who":"key_1"}'
    )
    by_hand = subprocess.run(["sha256sum"], input=text.encode(), capture_output=True, check=True).stdout
    assert row.computed() == by_hand.split()[0].decode()


OTHER = {
    "tenant": "other",
    "seq": 40,
    "who": "key_2",
    "what": "job.cancel",
    "object": "job_2",
    "request_id": None,
    "at": "2026-11-20T06:00:00.000001Z",
    "previous_hash": "1" * 64,
    "hash": "2" * 64,
}


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.parametrize("place", [1, 4, 8])
def test_a_changed_field(name: str, place: int) -> None:
    """In the first row, a signing one and the last: named by its number (a changed number is out of order)."""
    log = a_log()
    log.rows[place - 1] = replace(log.rows[place - 1], **{name: OTHER[name]})
    code, seq = broken(log.export())
    assert (code, seq) == ("not_in_order", 40) if name == "seq" else seq == place


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_changed_field_with_its_hash_made_good(name: str) -> None:
    """The row then agrees with itself, and the next one does not follow it."""
    log = a_log()
    changed = replace(log.rows[1], **{name: OTHER[name]})
    log.rows[1] = changed if name == "hash" else replace(changed, hash=changed.computed())
    code, seq = broken(log.export())
    if name in ("seq", "tenant", "previous_hash", "hash"):
        assert seq in (2, 40)
    else:
        assert (code, seq) == ("not_chained", 3)


@pytest.mark.parametrize("name", ["tenant", "seq", "hash", "at", "key_id", "signature"])
def test_a_changed_field_of_a_head(name: str) -> None:
    log = a_log()
    other = {
        **OTHER,
        "key_id": chain.key_id_of(Ed25519PrivateKey.generate().public_key()),
        "signature": "AAAA",
    }
    log.heads[-1] = replace(log.heads[-1], **{name: other[name]})
    assert broken(log.export())[0] == "not_signed"


def dropped(log: Log) -> None:
    del log.rows[1]


def dropped_first(log: Log) -> None:
    del log.rows[0]


def swapped(log: Log) -> None:
    log.rows[1], log.rows[2] = log.rows[2], log.rows[1]


def doubled(log: Log) -> None:
    log.rows.insert(2, log.rows[1])


def inserted(log: Log) -> None:
    put_in = replace(log.rows[1], seq=3, previous_hash=log.rows[1].hash, object="job_9")
    log.rows.insert(2, replace(put_in, hash=put_in.computed()))


def of_another(log: Log) -> None:
    log.rows[1] = Log(tenant="other").act().act().rows[1]


@pytest.mark.parametrize(
    ("tamper", "where"),
    [
        (dropped, ("not_in_order", 3)),
        (dropped_first, ("not_in_order", 2)),
        (swapped, ("not_in_order", 3)),
        (doubled, ("not_in_order", 2)),
        (inserted, ("not_in_order", 3)),
        (of_another, ("other_tenant", 2)),
    ],
)
def test_dropped_moved_doubled_put_in(tamper: Callable[[Log], None], where: tuple[str, int]) -> None:
    log = a_log()
    tamper(log)
    assert broken(log.export()) == where


def rewritten(log: Log, key: Ed25519PrivateKey = KEY) -> Log:
    """The same number of rows written anew without the second, every hash made good, heads where they were."""
    anew = Log(key)
    for row in [log.rows[0], *log.rows[2:], log.rows[1]]:
        if row.what == chain.SIGN:
            anew.sign()
        else:
            anew.act(row.what, row.object)
    return anew


def test_the_whole_chain_rewritten_without_the_key() -> None:
    log = a_log()
    anew = rewritten(log)
    anew.heads = log.heads
    assert broken(anew.export()) == ("rewritten", 6)
    # With heads of another key, and with a signing row that names the old key and a head that cannot be made.
    assert broken(rewritten(log, Ed25519PrivateKey.generate()).export())[0] == "other_key"
    anew.heads = []
    assert broken(anew.export())[0] == "no_head"
    assert broken(Log().act().act().export())[0] == "no_head"
    assert broken([])[0] == "no_head"


def test_a_row_changed_and_all_after_it_made_good() -> None:
    """Signing rows stand where they stood and name the same key; only the signed hash is another one."""
    log = a_log()
    anew = Log()
    for row in log.rows:
        if row.what == chain.SIGN:
            anew.sign()
        else:
            anew.act(row.what, "job_other" if row.seq == 2 else row.object)
    anew.heads = log.heads
    assert broken(anew.export()) == ("rewritten", 6)
    assert broken(anew.export(all_heads=True))[0] == "rewritten"


def test_an_untrusted_key_is_seen_only_by_who_knows_the_right_one() -> None:
    """Not findable from the file alone: it agrees with itself. Hence --public-key."""
    anew = rewritten(a_log(), Ed25519PrivateKey.generate())
    assert verify(anew.export()).rows == 8


def test_who_holds_the_key_can_write_another_log() -> None:
    """Not findable, but by a head that somebody else has kept."""
    log = a_log()
    anew = rewritten(log)
    assert verify(anew.export(), trusted=TRUSTED).rows == 8
    assert broken(anew.export(), kept=log.heads[:1])[0] == "rewritten"
    assert verify(log.export(), trusted=TRUSTED, kept=log.heads).heads == 2


@pytest.mark.parametrize("left", [1, 3, 4, 5])
def test_cut_off_before_the_newest_head(left: int) -> None:
    log = a_log()
    log.rows = log.rows[:left]
    assert broken(log.export()) == ("cut_off", left)


def test_rows_after_the_newest_head_can_be_cut_off_unseen() -> None:
    """Documented as not findable: they are told as unsigned while they are there."""
    log = a_log()
    log.rows = log.rows[:6]
    assert verify(log.export(), trusted=TRUSTED).unsigned == 0


def test_rows_and_heads_cut_off_together() -> None:
    """Not findable in the log alone; a kept head shows it, and so does the newest head's age."""
    log = a_log()
    kept = log.heads[-1]
    log.rows, log.heads = log.rows[:4], log.heads[:1]
    now = datetime.fromisoformat(kept.at)
    assert verify(log.export(), trusted=TRUSTED, now=now).doubts == []
    assert broken(log.export(), kept=[kept]) == ("cut_off", 4)
    (doubt,) = verify(log.export(), trusted=TRUSTED, now=now + timedelta(days=2)).doubts
    assert log.heads[-1].at in doubt


def test_set_back_and_written_on() -> None:
    """The days that are gone leave a pause between two heads, which are signed daily."""
    log = Log().act().sign()
    for _ in range(5):
        log.sign(hours=24)
    assert verify(log.export(), trusted=TRUSTED).doubts == []
    log.rows, log.heads = log.rows[:3], log.heads[:2]
    log.sign(hours=72)
    (doubt,) = verify(log.export(), trusted=TRUSTED).doubts
    assert log.rows[2].at in doubt


def test_a_head_taken_away() -> None:
    log = a_log()
    gone = log.heads.pop(0)
    assert broken(log.export(all_heads=True), all_heads=True) == ("head_gone", gone.seq)
    log = a_log()
    log.heads.pop()  # the newest: the export ends with the one before, but the log tells of it
    assert broken(log.export()) == ("head_gone", 6)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"row"',
        b'{"row": []}',
        b'{"row": {}}',
        b'{"other": {}}',
        b"\xff",
        b"[" * 100_000,
        b'{"row": {}, "head": {}}',
    ],
)
def test_lines_that_are_none(line: bytes) -> None:
    assert broken([*a_log().export()[:2], line])[0] == "unreadable"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq", True),
        ("seq", 1.0),
        ("seq", "1"),
        ("who", None),
        ("who", 3),
        ("at", "2026-99-99"),
        ("hash", None),
    ],
)
def test_fields_of_another_kind(name: str, value: object) -> None:
    first = {**asdict(a_log().rows[0]), name: value}
    assert broken([json.dumps({"row": first}).encode()])[0] == "unreadable"


def test_more_fields_and_names_twice() -> None:
    """What a reader that is less strict could take for another row."""
    first = a_log().export()[0]
    assert broken([first.replace(b'"who":', b'"note":"","who":')])[0] == "unreadable"
    assert broken([first.replace(b'"who":', b'"who":"key_9","who":')])[0] == "unreadable"
    assert broken([first.replace(b'"key_1"', b'"key_\\ud800"')]) == ("changed", 1)


def test_it_needs_nothing_of_the_service() -> None:
    """Only Python and `cryptography`: an auditor can take the one file."""
    code = f"import sys, runpy; runpy.run_path({chain.__file__!r}); " + (
        "assert not {'sqlalchemy', 'pydantic', 'store'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
