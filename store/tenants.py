"""Tenants with limits of their own, and the quotas that every tenant has.

Whoever holds the database makes tenants (`seuf tenants`); no key can. A tenant without a row has the limits of the
settings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.audit import hold
from store.errors import InvalidNameError, NameTakenError, NotFoundError, QuotaExceededError
from store.limits import Limits
from store.repository import DEFAULT_TENANT, Repository
from store.tables import Checkpoint, File, Job, Tenant, UploadPart
from store.transitions import FINAL, Status

_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ACTIVE: Final = tuple(sorted(set(Status) - FINAL))


@dataclass(frozen=True)
class Used:
    """What a tenant has: jobs that have not ended, and bytes of sets, parts of uploads and checkpoints."""

    active_jobs: int
    stored_bytes: int


class Tenants:
    """All tenants. For whoever holds the database, never for a request."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def create(self, tenant: str) -> Tenant:
        """A tenant with the limits of the settings. InvalidNameError, NameTakenError."""
        if not _ID.fullmatch(tenant):
            raise InvalidNameError(
                f"{tenant!r} is no name of a tenant.", "Use up to 63 of a-z, 0-9 and -, not - in front."
            )
        if self.session.get(Tenant, tenant) is not None:
            raise NameTakenError(f"There is a tenant {tenant!r} already.", "Choose another name.")
        row = Tenant(id=tenant)
        self.session.add(row)
        self.session.flush()
        return row

    def get(self, tenant: str) -> Tenant:
        """The tenant, or NotFoundError. The default tenant is always there."""
        row = self.session.get(Tenant, tenant)
        if row is None and tenant == DEFAULT_TENANT:
            return self.create(tenant)
        if row is None:
            raise NotFoundError("tenant", tenant)
        return row

    def list(self) -> Sequence[Tenant]:
        """Every tenant that has a row, by name."""
        return self.session.scalars(select(Tenant).order_by(Tenant.id)).all()


def limits_of(session: Session, tenant: str, settings: Limits) -> Limits:
    """The tenant's own limits, those of the settings where it has none."""
    row = session.get(Tenant, tenant)
    if row is None:
        return settings
    own = (row.max_active_jobs, row.max_stored_bytes, row.requests_per_minute)
    defaults = (settings.max_active_jobs, settings.max_stored_bytes, settings.requests_per_minute)
    return Limits(*(given if mine is None else mine for mine, given in zip(own, defaults, strict=True)))


class Quota(Repository):
    """What one tenant may still create. Asked in the transaction that creates, before anything is created.

    From the question on, others who create for this tenant wait until the transaction ends (they all hold the tenant's
    audit chain, which is taken here first): two requests cannot both take the last place. SQLite has one writer at a
    time anyway.
    """

    def check(self, settings: Limits, jobs: int = 0, stored_bytes: int = 0) -> None:
        """QuotaExceededError unless there is room for so many more jobs and bytes."""
        limits = limits_of(self.session, self.tenant, settings)
        if limits.max_active_jobs == 0 and limits.max_stored_bytes == 0:
            return
        hold(self.session, self.tenant)
        used = self.used()
        if jobs and 0 < limits.max_active_jobs < used.active_jobs + jobs:
            raise QuotaExceededError(
                f"{used.active_jobs} jobs are queued or running; {limits.max_active_jobs} are allowed.",
                "Wait for one to end or cancel one; `seuf tenants set --max-active-jobs` allows more.",
            )
        if 0 < limits.max_stored_bytes < used.stored_bytes + stored_bytes:
            raise QuotaExceededError(
                f"{used.stored_bytes} bytes are stored and this needs {stored_bytes} more; "
                f"{limits.max_stored_bytes} are allowed.",
                "Delete files that no job needs; `seuf tenants set --max-stored-bytes` allows more.",
            )

    def used(self) -> Used:
        """What the tenant has now, in one statement."""
        active = self._select(Job).where(Job.status.in_(ACTIVE)).with_only_columns(func.count())
        files = self._select(File).where(File.deleted_at.is_(None)).with_only_columns(func.sum(File.bytes))
        parts = self._select(UploadPart).with_only_columns(func.sum(UploadPart.bytes))
        made = self._select(Checkpoint).with_only_columns(func.sum(Checkpoint.bytes))
        found = self.session.execute(select(*(q.scalar_subquery() for q in (active, files, parts, made)))).one()
        jobs, *stored = (int(number or 0) for number in found)
        return Used(jobs, sum(stored))
