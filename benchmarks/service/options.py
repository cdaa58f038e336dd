"""How much is measured: as much as a figure needs, or as little as a test of the benchmark itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The sizes of every part.

    Attributes:
        repeats: a figure is the median of so many.
        requests: of each way in one repeat of a latency.
        seconds: of one measurement of a rate.
        watchers: of one job.
        jobs: of no work, and tasks of Celery.
        bytes: of the file that is downloaded.
        upload_bytes: of the set that is uploaded.
        load_seconds: of the mixed load. clients: of the mixed load, of each kind.
        whole: what is unlearned: the reference model, or a tiny one in seconds.
    """

    repeats: int = 5
    requests: int = 1000
    seconds: float = 2.0
    watchers: int = 500
    jobs: int = 20
    bytes: int = 1 << 30
    upload_bytes: int = 60 << 20
    load_seconds: float = 60.0
    clients: int = 4
    whole: bool = True


SMALL = Options(
    repeats=1,
    requests=100,
    seconds=0.2,
    watchers=20,
    jobs=3,
    bytes=8 << 20,
    upload_bytes=1 << 20,
    load_seconds=3.0,
    clients=1,
    whole=False,
)
