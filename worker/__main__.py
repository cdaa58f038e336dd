"""`python -m worker`: run jobs, on the lane that the settings name."""

import argparse

from store.settings import Settings
from worker import telling
from worker.lanes import run_database_lane
from worker.life import StopFlag, open_database


def main() -> None:
    """Entry of `python -m worker`."""
    settings = Settings()
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("--lane", choices=("database", "celery"), default=settings.lane)
    given = parser.parse_args()
    if given.lane == "celery":
        from worker.app import app

        app.worker_main(["worker", "--loglevel", "INFO"])
    else:
        telling.begin(settings, "seuf-worker")
        database = open_database(settings)
        run_database_lane(database, settings, StopFlag().wait)


if __name__ == "__main__":
    main()
