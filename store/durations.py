"""How long a job took, phase by phase, from its times and events."""

from datetime import datetime
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.tables import Event, Job

WAITING: Final = ("queued", "starting")
"""What comes before the first phase: until the first claim, and until its engine says something."""


def of_phases(session: Session, job_id: str, until: datetime) -> dict[str, float]:
    """Seconds of each phase, the last one ending at `until`; the waiting before the first is two phases more.

    A phase lasts from the first time the job was in it to the first time it was in the next one. So what a lost
    attempt cost is in the phase that it was lost in.
    """
    phase = Event.data["phase"].as_string()
    query = (
        select(phase, func.min(Event.at)).where(Event.job_id == job_id, Event.type == "phase").group_by(phase)
    )
    begun = sorted(((at, name) for name, at in session.execute(query)), key=lambda row: row[0])
    created_at, started_at = session.execute(
        select(Job.created_at, Job.started_at).where(Job.id == job_id)
    ).one()
    starts = [(created_at, "queued"), (started_at or until, "starting"), *begun]
    ends = [at for at, _ in starts[1:]] + [until]
    # Clocks of two machines: never below zero.
    return {
        name: max(0.0, round((end - at).total_seconds(), 3))
        for (at, name), end in zip(starts, ends, strict=True)
    }
