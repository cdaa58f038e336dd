"""Finished checkpoints of one tenant.

Rows are written by store.fenced only, together with the job's success.
"""

from store.repository import Page, Repository
from store.tables import Checkpoint


def artefact_key(checkpoint_id: str) -> str:
    """The artefact folder of a checkpoint."""
    return f"checkpoints/{checkpoint_id}"


class Checkpoints(Repository):
    """The checkpoints of one tenant."""

    def get(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint, or NotFoundError."""
        query = self._select(Checkpoint).where(Checkpoint.id == checkpoint_id)
        return self._one(query, "checkpoint", checkpoint_id)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[Checkpoint]:
        """Newest first."""
        return self._page(self._select(Checkpoint), Checkpoint, cursor, limit)
