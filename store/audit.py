"""Who did what: rows that are only ever added, in the transaction of the act itself, each chained to the one before."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from store.repository import Repository
from store.tables import AuditChain, AuditRow, now

START: Final = "0" * 64
"""What the first row of a chain has before it."""


class Audit(Repository):
    """The audit log of one tenant."""

    def record(self, who: str, what: str, object_id: str, request_id: str | None = None) -> None:
        """`who` (a key id, "system") did `what` ("job.create", "file.delete") to `object_id`.

        Never any text of a set. Until the caller's transaction ends, others who record for this tenant wait.
        """
        chain = _held(self.session, self.tenant)
        row = AuditRow(
            seq=chain.seq + 1,
            who=who,
            what=what,
            object=object_id,
            request_id=request_id,
            at=now(),
            previous_hash=chain.hash,
        )
        row.tenant = self.tenant
        row.hash = hash_of(row)
        chain.seq, chain.hash = row.seq, row.hash
        self._add(row)

    def list(self, after: int = 0, limit: int = 100) -> Sequence[AuditRow]:
        """Rows with a number above `after`, oldest first."""
        query = self._select(AuditRow).where(AuditRow.seq > after).order_by(AuditRow.seq).limit(limit)
        return self.session.scalars(query).all()


def hash_of(row: AuditRow) -> str:
    """sha256 of a row as sorted compact JSON, with the hash of the row before it among its fields; in hex."""
    fields = ("tenant", "seq", "who", "what", "object", "request_id", "previous_hash")
    named = {"at": _written(row.at), **{name: getattr(row, name) for name in fields}}
    return hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _written(at: datetime) -> str:
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _held(session: Session, tenant: str) -> AuditChain:
    """The tenant's chain, made if it is not there, its row held until the transaction ends."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    begin = dialect.insert(AuditChain).values(tenant=tenant, seq=0, hash=START)
    session.execute(begin.on_conflict_do_nothing())
    hold = update(AuditChain).where(AuditChain.tenant == tenant).values(seq=AuditChain.seq)
    return session.scalars(
        hold.returning(AuditChain),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one()
