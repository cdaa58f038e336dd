"""What a tenant may have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a tenant may have; 0: as much as it likes. The rate is that of each of its keys."""

    max_active_jobs: int
    max_stored_bytes: int
    requests_per_minute: int
