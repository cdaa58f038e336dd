"""Who did what: rows that are only ever added, in the transaction of the act itself, each chained to the one before
(store.chain), and the signed heads of that chain.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Select, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session

from store import chain
from store.chain import START
from store.errors import InvalidCursorError
from store.repository import MAX_PAGE, Page, Repository
from store.tables import AuditChain, AuditHead, AuditRow, now

SYSTEM: Final = "system"
"""Who did what no caller asked for: a worker that ran a job, a sweep that deleted something."""
DAY: Final = timedelta(days=1)
Numbered = TypeVar("Numbered", bound=AuditRow | AuditHead)


class Audit(Repository):
    """The audit log of one tenant."""

    def record(self, who: str, what: str, object_id: str, request_id: str | None = None) -> AuditRow:
        """`who` (a key id, SYSTEM) did `what` ("job.create", "file.delete") to `object_id`.

        Never any text of a set. Until the caller's transaction ends, others who record for this tenant wait.
        """
        held = hold(self.session, self.tenant)
        row = AuditRow(
            seq=held.seq + 1,
            who=who,
            what=what,
            object=object_id,
            request_id=request_id,
            at=now(),
            previous_hash=held.hash,
        )
        row.tenant = self.tenant
        row.hash = hash_of(row)
        held.seq, held.hash = row.seq, row.hash
        self._add(row)
        return row

    def sign(self, key: Ed25519PrivateKey) -> AuditHead:
        """Sign where the chain stands: one more row, that a head was signed, and the head that has it last."""
        key_id = chain.key_id_of(key.public_key())
        row = self.record(SYSTEM, chain.SIGN, key_id)
        head = chain.sign(plain(row), key)
        signed = AuditHead(seq=row.seq, hash=row.hash, at=row.at, key_id=key_id, signature=head.signature)
        self._add(signed)
        return signed

    def list(self, after: int = 0, limit: int = 100, until: int | None = None) -> Sequence[AuditRow]:
        """Rows with a number above `after` (and not above `until`), oldest first."""
        query = self._select(AuditRow).where(AuditRow.seq > after).order_by(AuditRow.seq).limit(limit)
        if until is not None:
            query = query.where(AuditRow.seq <= until)
        return self.session.scalars(query).all()

    def page(
        self,
        cursor: str | None = None,
        limit: int = 20,
        who: str | None = None,
        what: str | None = None,
        object_id: str | None = None,
        since: datetime | None = None,
    ) -> Page[AuditRow]:
        """Newest first; every given filter must match. `since`: not before that time."""
        query = self._select(AuditRow)
        for column, wanted in ((AuditRow.who, who), (AuditRow.what, what), (AuditRow.object, object_id)):
            if wanted is not None:
                query = query.where(column == wanted)
        if since is not None:
            query = query.where(AuditRow.at >= since)
        return self._numbered(query, AuditRow.seq, cursor, limit)

    def heads(self, cursor: str | None = None, limit: int = 20) -> Page[AuditHead]:
        """The signed heads, newest first."""
        return self._numbered(self._select(AuditHead), AuditHead.seq, cursor, limit)

    def end(self) -> tuple[int, AuditHead | None]:
        """The number of the last row, and the newest head: what an export that starts now has to reach."""
        # One statement, so that both are of one moment.
        query = (
            select(AuditChain.seq, AuditHead)
            .outerjoin(AuditHead, AuditHead.tenant == AuditChain.tenant)
            .where(AuditChain.tenant == self.tenant)
            .order_by(AuditHead.seq.desc())
            .limit(1)
        )
        row = self.session.execute(query).one_or_none()
        return (row[0], row[1]) if row is not None else (0, None)

    def _numbered(
        self, query: Select[Numbered], seq: InstrumentedAttribute[int], cursor: str | None, limit: int
    ) -> Page[Numbered]:
        limit = max(1, min(limit, MAX_PAGE))
        if cursor is not None:
            query = query.where(seq < _seq_of(cursor))
        rows = [*self.session.scalars(query.order_by(seq.desc()).limit(limit + 1))]
        return Page(rows[:limit], str(rows[limit - 1].seq) if len(rows) > limit else None)


def hash_of(row: AuditRow) -> str:
    """The hash that a row must have (store.chain)."""
    return plain(row).computed()


def plain(row: AuditRow) -> chain.Row:
    """A row as it is hashed, exported and checked."""
    return chain.Row(
        tenant=row.tenant,
        seq=row.seq,
        who=row.who,
        what=row.what,
        object=row.object,
        request_id=row.request_id,
        at=chain.written(row.at),
        previous_hash=row.previous_hash,
        hash=row.hash or "",
    )


def plain_head(head: AuditHead) -> chain.Head:
    """A head as it is signed, exported and checked."""
    return chain.Head(
        tenant=head.tenant,
        seq=head.seq,
        hash=head.hash,
        at=chain.written(head.at),
        key_id=head.key_id,
        signature=head.signature,
    )


def due(session: Session, every: timedelta) -> list[str]:
    """Tenants whose chain is to be signed: rows were added and the newest head is older than `every`, or it is
    older than a day, or there is none.
    """
    newest = (
        select(AuditHead.tenant, func.max(AuditHead.seq).label("seq"), func.max(AuditHead.at).label("at"))
        .group_by(AuditHead.tenant)
        .subquery()
    )
    at = now()
    unsigned = (newest.c.seq < AuditChain.seq) & (newest.c.at <= at - every)
    query = (
        select(AuditChain.tenant)
        .outerjoin(newest, newest.c.tenant == AuditChain.tenant)
        .where(newest.c.seq.is_(None) | unsigned | (newest.c.at <= at - DAY))
    )
    return list(session.scalars(query.order_by(AuditChain.tenant)))


def _seq_of(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidCursorError(
            f"{cursor!r} is not a cursor of this service.", "Use the `next` of a page as it is."
        )
    return int(cursor)


def hold(session: Session, tenant: str) -> AuditChain:
    """The tenant's chain, made if it is not there, its row held until the transaction ends."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    begin = dialect.insert(AuditChain).values(tenant=tenant, seq=0, hash=START)
    turn = begin.on_conflict_do_update(index_elements=["tenant"], set_={"seq": AuditChain.seq})
    rows = session.scalars(turn.returning(AuditChain), execution_options={"populate_existing": True})
    chain: AuditChain = rows.one()
    return chain
