"""Who did what: rows that are only ever added, in the transaction of the act itself."""

from collections.abc import Sequence

from store.repository import Repository
from store.tables import AuditRow


class Audit(Repository):
    """The audit log of one tenant."""

    def record(self, who: str, what: str, object_id: str) -> None:
        """`who` (a key id, "system") did `what` ("job.create", "file.delete") to `object_id`.

        Never any text of a set.
        """
        self._add(AuditRow(who=who, what=what, object=object_id))

    def list(self, after: int = 0, limit: int = 100) -> Sequence[AuditRow]:
        """Rows with an id above `after`, oldest first."""
        query = self._select(AuditRow).where(AuditRow.id > after).order_by(AuditRow.id).limit(limit)
        return self.session.scalars(query).all()
