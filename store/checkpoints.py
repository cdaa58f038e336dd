"""Finished checkpoints of one tenant.

Rows are written by store.fenced only, together with the job's success.
"""

import hashlib
from base64 import b32encode

from store.repository import Page, Repository
from store.tables import Checkpoint


def id_of(job_id: str, token: int) -> str:
    """The id of the checkpoint that the holder of lease `token` may publish for the job.

    It follows from the lease, so that a sweep can tell a folder that may still get its row from one that never will.
    """
    digest = hashlib.sha256(f"{job_id}/{token}".encode()).digest()
    return f"ckpt_{b32encode(digest).decode().lower()[:20]}"


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
