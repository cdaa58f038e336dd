"""The audit log as anyone can check it: with its lines and a public key, no database and no service.

A row is hashed as canonical JSON (RFC 8785: sorted keys, no spaces, UTF-8; here only strings, whole numbers and
null) with the hash of the row before it among its fields. So whoever knows a row's hash can see whether any row
up to it was changed, dropped, moved or put in between.

A head is an ed25519 signature over where the chain stood. Each has a row of its own in the log ("audit.sign"), so
heads are chained by the log itself: none in the middle can be taken away unseen, and a day without one shows.
What no log can show by itself is that its end was cut off, rows and heads together: for that, somebody else has
to keep a head.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

START: Final = "0" * 64
"""What the first row of a chain has before it."""
SIGN: Final = "audit.sign"
"""What the row of a signed head says was done; its object is the key."""
QUIET: Final = timedelta(hours=26)
"""Heads are signed at least daily; a longer pause is told. (Two hours: a restart is no doubt.)"""


@dataclass(frozen=True)
class Row:
    """One act: `who` did `what` to `object`. `at` is UTC with microseconds and Z; `hash` covers all the others."""

    tenant: str
    seq: int
    who: str
    what: str
    object: str
    request_id: str | None
    at: str
    previous_hash: str
    hash: str

    def computed(self) -> str:
        """The hash that this row must have."""
        hashed = {name: value for name, value in asdict(self).items() if name != "hash"}
        return hashlib.sha256(canonical(hashed)).hexdigest()


@dataclass(frozen=True)
class Head:
    """Signed: at `at` the chain's last row was `seq`, with this hash.

    `key_id` is the public key itself, 32 bytes in hexadecimal; `signature` is in base64.
    """

    tenant: str
    seq: int
    hash: str
    at: str
    key_id: str
    signature: str

    def message(self) -> bytes:
        """The bytes that are signed. They begin with what they are: the key may sign other things too."""
        told = {name: value for name, value in asdict(self).items() if name != "signature"}
        return b"seuf audit head\n" + canonical(told)

    def is_signed(self) -> bool:
        """Was it signed by the key that it names?"""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key_id))
            key.verify(b64decode(self.signature, validate=True), self.message())
        except (InvalidSignature, ValueError):
            return False
        return True


class BrokenError(Exception):
    """The log is not what it was. `seq` names the first row where that shows (None: no row)."""

    def __init__(self, code: str, seq: int | None, message: str) -> None:
        super().__init__(message if seq is None else f"Row {seq}: {message}")
        self.code = code
        self.seq = seq


@dataclass
class Findings:
    """What a whole log has: rows, heads, the newest head, and what should make a reader ask."""

    tenant: str | None = None
    rows: int = 0
    heads: int = 0
    newest: Head | None = None
    doubts: list[str] = field(default_factory=list)

    @property
    def unsigned(self) -> int:
        """Rows after the newest head: chained, but not yet signed."""
        return self.rows - (self.newest.seq if self.newest else 0)


def canonical(value: Mapping[str, Any]) -> bytes:
    """RFC 8785 for objects of strings, whole numbers and null."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")  # half a pair, in a file that was tampered with, is no crash


def written(at: datetime) -> str:
    """A time as rows and heads have it."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def key_id_of(key: Ed25519PublicKey) -> str:
    """The public key in hexadecimal, which is also its name."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(row: Row, key: Ed25519PrivateKey) -> Head:
    """The head that has `row` last."""
    unsigned = Head(row.tenant, row.seq, row.hash, row.at, key_id_of(key.public_key()), "")
    return Head(**{**asdict(unsigned), "signature": b64encode(key.sign(unsigned.message())).decode()})


def lines_of(rows: Iterable[Row], newest: Head | None) -> Iterator[bytes]:
    """A log as JSON Lines: every row, then the newest head."""
    for row in rows:
        yield canonical({"row": asdict(row)}) + b"\n"
    if newest is not None:
        yield canonical({"head": asdict(newest)}) + b"\n"


def verify(
    lines: Iterable[bytes],
    *,
    trusted: Collection[str] = (),
    kept: Collection[Head] = (),
    all_heads: bool = False,
    now: datetime | None = None,
) -> Findings:
    """Check a log (`lines_of`); BrokenError at the first row that is not as it was.

    Args:
        lines: the rows in order, and heads.
        trusted: ids of the keys that may have signed; empty: any key, which shows only that the log agrees with itself.
        kept: heads that were kept elsewhere: the log must still reach each of them.
        all_heads: `lines` has every head, so every row of a head must have its own.
        now: what the newest head's age is counted from; None: it is not looked at.
    """
    check = _Check(frozenset(trusted))
    for number, line in enumerate(lines, 1):
        kind, given = _read(number, line)
        if kind == "row":
            check.row(given)
        else:
            check.head(given)
    for head in kept:
        check.head(head)
    return check.finish(all_heads, now)


def _read(number: int, line: bytes) -> tuple[str, Row | Head]:
    """One line: {"row": {...}} or {"head": {...}}, with exactly the fields of each."""
    try:
        parsed = json.loads(line, object_pairs_hook=_once)
        ((kind, given),) = parsed.items()
        made: Row | Head = {"row": Row, "head": Head}[kind](**given)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"Line {number} is neither a row nor a head of an audit log."
        raise BrokenError("unreadable", None, message) from error
    for name in (one.name for one in fields(made)):
        value = getattr(made, name)
        fits = type(value) is int if name == "seq" else isinstance(value, str)
        fits = fits or (name == "request_id" and value is None)
        if not fits or (name == "at" and not _is_time(value)):
            raise BrokenError("unreadable", None, f"Line {number}: {name} is not what a {kind} has there.")
    return kind, made


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that comes twice: two readers could then see two different rows."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


class _Check:
    """The log as far as it was read."""

    def __init__(self, trusted: frozenset[str]) -> None:
        self.trusted = trusted
        self.last: Row | None = None
        self.found = Findings()
        self.signing: dict[int, Row] = {}
        self.heads: dict[int, Head] = {}

    def row(self, row: Row | Head) -> None:
        assert isinstance(row, Row)
        seq, previous = (self.last.seq, self.last.hash) if self.last else (0, START)
        if row.seq != seq + 1:
            raise BrokenError(
                "not_in_order", row.seq, f"it comes after row {seq}: rows are missing, moved or doubled."
            )
        if self.last is not None and row.tenant != self.last.tenant:
            raise BrokenError(
                "other_tenant", seq + 1, f"it is of {row.tenant}, the log of {self.last.tenant}."
            )
        if row.previous_hash != previous:
            raise BrokenError(
                "not_chained", row.seq, "it does not follow the row before it: one of them was replaced."
            )
        if row.hash != row.computed():
            raise BrokenError("changed", row.seq, "its content is not what was hashed.")
        if row.what == SIGN:
            self._pause(row)
            self.signing[row.seq] = row
        self.last = row
        self.found.tenant, self.found.rows = row.tenant, row.seq

    def _pause(self, row: Row) -> None:
        before = next(reversed(self.signing.values()), None)
        if before is not None and _time(row.at) - _time(before.at) > QUIET:
            self.found.doubts.append(
                f"No head was signed from {before.at} to {row.at}, although one is each day: the service did not run, "
                "or the log was set back to an older state."
            )

    def head(self, head: Row | Head) -> None:
        """Heads come after the rows; one that was kept elsewhere too."""
        assert isinstance(head, Head)
        if not head.is_signed():
            raise BrokenError("not_signed", head.seq, "the signature of its head is wrong.")
        if self.trusted and head.key_id not in self.trusted:
            raise BrokenError("other_key", head.seq, f"its head was signed by another key: {head.key_id}.")
        rows = self.found.rows
        if head.seq > rows:
            raise BrokenError(
                "cut_off", rows, f"the log ends here; a signed head says that it reached row {head.seq}."
            )
        row = self.signing.get(head.seq)
        told = (head.tenant, head.hash, head.at, head.key_id)
        if row is None or told != (row.tenant, row.hash, row.at, row.object):
            raise BrokenError(
                "rewritten", head.seq, "a signed head has another row here: the log was written anew."
            )
        self.heads[head.seq] = head

    def finish(self, all_heads: bool, now: datetime | None) -> Findings:
        if not self.heads:
            raise BrokenError(
                "no_head", None, "No signed head: nothing shows that this log is what was written."
            )
        newest = self.heads[max(self.heads)]
        wanted = self.signing if all_heads else [seq for seq in self.signing if seq > newest.seq]
        for seq in sorted(set(wanted) - self.heads.keys()):
            raise BrokenError("head_gone", seq, "it says that a head was signed here; that head is missing.")
        if now is not None and now - _time(newest.at) > QUIET:
            self.found.doubts.append(
                f"The newest head is of {newest.at}: the service has not run since, or what came after was cut off."
            )
        self.found.heads, self.found.newest = len(self.heads), newest
        return self.found


def _time(at: str) -> datetime:
    return datetime.fromisoformat(at)


def _is_time(at: str) -> bool:
    try:
        return written(_time(at)) == at
    except (ValueError, OverflowError):
        return False
