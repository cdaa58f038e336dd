"""Which state of a job may follow which. The only place that says so; every writer asks here."""

from collections.abc import Mapping
from enum import StrEnum

from store.errors import TransitionRefusedError


class Status(StrEnum):
    """Where a job stands. `rejected`: it ran, but its result missed the acceptance criteria."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    # A worker claims it, or somebody cancels it before that.
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED}),
    # Back to queued: its lease expired and attempts remain.
    Status.RUNNING: frozenset(
        {Status.QUEUED, Status.CANCELLING, Status.SUCCEEDED, Status.FAILED, Status.REJECTED}
    ),
    # A cancel may come too late: a result that is complete by then is kept rather than thrown away.
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.SUCCEEDED, Status.FAILED, Status.REJECTED}),
    Status.CANCELLED: frozenset(),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.REJECTED: frozenset(),
}

FINAL = frozenset(status for status, following in TRANSITIONS.items() if not following)
HELD = frozenset({Status.RUNNING, Status.CANCELLING})
"""The states in which a worker holds the job's lease."""
RETRIABLE = frozenset({Status.FAILED, Status.CANCELLED})
"""The final states of which a new job may go on from the training checkpoints."""


def allowed(before: Status, after: Status) -> bool:
    """May a job go from `before` to `after`?"""
    return after in TRANSITIONS[before]


def sources(after: Status) -> frozenset[Status]:
    """Every state from which a job may go to `after` (for the WHERE of an UPDATE)."""
    return frozenset(before for before, following in TRANSITIONS.items() if after in following)


def check(job_id: str, before: Status, after: Status) -> None:
    """Raise TransitionRefusedError unless the table has the arrow."""
    if not allowed(before, after):
        following = ", ".join(sorted(TRANSITIONS[before])) or "nothing: it is final"
        raise TransitionRefusedError(
            f"{job_id} is {before} and cannot become {after}.", f"From {before} a job goes to {following}."
        )
