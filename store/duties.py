"""Who has a duty: work that one process does for all of them, until it is done or the process falls silent.

The clock is the database's. Each function runs in the caller's transaction.
"""

from datetime import timedelta

from sqlalchemy import or_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from store.database import utc_now
from store.tables import Duty


def take(session: Session, name: str, holder: str, seconds: float) -> bool:
    """Have the duty `name` for so long, if nobody else has it now; False: somebody has."""
    at = utc_now(session)
    held = {"holder": holder, "expires_at": at + timedelta(seconds=seconds)}
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    # One statement, so that of two who are the first ever one wins and the other is told so.
    query = (
        insert(Duty)
        .values(name=name, **held)
        .on_conflict_do_update(
            index_elements=[Duty.name], set_=held, where=or_(Duty.holder == holder, Duty.expires_at < at)
        )
        .returning(Duty.name)
    )
    return session.execute(query).one_or_none() is not None


def keep(session: Session, name: str, holder: str, seconds: float) -> bool:
    """Have it for so long from now; False: it was taken over meanwhile."""
    query = (
        update(Duty)
        .where(Duty.name == name, Duty.holder == holder)
        .values(expires_at=utc_now(session) + timedelta(seconds=seconds))
        .returning(Duty.name)
    )
    return session.execute(query, execution_options={"synchronize_session": False}).one_or_none() is not None
