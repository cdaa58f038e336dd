"""The engine process: `python -m worker.engine`, started by the supervisor ahead of the job it will run.

Loading the library takes seconds, so it is done before there is a job; then one line on standard input, job
id and lease token, starts it. Reads the job from the store, calls the method, publishes the checkpoint.
Ends with exit code 0 when the job's end is written (or the lease is lost), 3 when it was stopped: then the
supervisor knows why and writes it.
"""

import fcntl
import hashlib
import importlib
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import select

from seuf_core.errors import Cancelled, DataError, SeufError
from seuf_core.method import Method
from store import checkpoints, files
from store.artefacts import Artefacts
from store.database import Database
from store.errors import LeaseLost
from store.fenced import FencedJob, Measurement
from store.ids import new_id
from store.settings import Settings
from store.tables import Checkpoint, Job, Model
from worker.life import StopFlag, die_with_parent
from worker.progress import MORE_MEMORY, JobObserver, attribution_of, insist, selected

if TYPE_CHECKING:
    from seuf_core.pipeline import UnlearnResult

log = logging.getLogger("worker.engine")

STOPPED = 3


@dataclass(frozen=True)
class Inputs:
    """What the method is given."""

    model: Path
    forget: Path
    retain: Path | None
    evaluation: Path | None
    method: Method


class Engine:
    """One claimed job, from its row to its end."""

    def __init__(self, settings: Settings, job_id: str, token: int, stop: Callable[[], bool]) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.artefacts = Artefacts(settings.artefacts_url)
        self.job = FencedJob(self.database, job_id, token)
        self.stop = stop
        self.work = settings.work_dir / job_id
        self.training = self.work / "training"
        self.out = self.work / f"out-{token}"

    def run(self) -> int:
        """The exit code; see above."""
        try:
            with _alone(self.work):
                result = self._call()
                self._publish(result)
        except Cancelled:
            return STOPPED
        except LeaseLost as lost:
            log.warning("%s", lost.message)
            return 0
        except SeufError as error:
            self._fail(error.code, error.message, error.fix)
        except Exception as error:
            self._fail(*_crash(error))
        else:
            shutil.rmtree(self.work, ignore_errors=True)
        return 0

    def _call(self) -> "UnlearnResult":
        inputs = self._inputs()
        unlearn = _load(self.settings.engine_entry)
        self._tidy()
        result = unlearn(
            inputs.model,
            inputs.forget,
            self.out,
            retain=inputs.retain,
            evaluation=inputs.evaluation,
            method=inputs.method,
            work=self.training,
            observer=JobObserver(self.job, self.stop),
            # Nobody writes into a file of a published checkpoint, so it may be the base's own.
            share="hardlink",
        )
        return cast("UnlearnResult", result)

    def _tidy(self) -> None:
        """What an attempt that was killed left half-written; its training checkpoints stay."""
        for entry in self.work.iterdir():
            if entry.is_dir() and entry != self.training:
                shutil.rmtree(entry)

    def _inputs(self) -> Inputs:
        job, model = insist(self._rows)
        forget = self._set("/forget_set", job.forget_file, job.forget_sha256)
        assert forget is not None
        return Inputs(
            Path(model.path),
            forget,
            self._set("/retain_set", job.retain_file, job.retain_sha256),
            self._set("/evaluation_set", job.evaluation_file, job.evaluation_sha256),
            Method.model_validate(job.method),
        )

    def _rows(self) -> tuple[Job, Model]:
        with self.database.read() as session:
            job = session.scalars(select(Job).where(Job.id == self.job.job_id)).one()
            return job, session.scalars(select(Model).where(Model.id == job.model_id)).one()

    def _set(self, pointer: str, file_id: str | None, sha256: str | None) -> Path | None:
        """Where a set's bytes lie, once they are known to be the ones that were submitted."""
        if file_id is None:
            return None
        path = self.artefacts.path(files.artefact_key(file_id))
        if not path.is_file():
            message = (
                f"The bytes of {file_id} are gone: it was deleted, or this worker cannot see the storage."
            )
            raise DataError("file_gone", message, "Upload the file again and submit a new job.", pointer)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            message = f"The bytes of {file_id} are no longer those that were submitted (sha256 {found})."
            raise DataError("file_changed", message, "Upload the file again and submit a new job.", pointer)
        return path

    def _publish(self, result: "UnlearnResult") -> None:
        """First the whole folder under its name, then the row and the success in one transaction."""
        assert result.manifest is not None
        checkpoint_id = new_id("ckpt")
        key = checkpoints.artefact_key(checkpoint_id)
        size = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
        manifest = result.manifest.model_dump(mode="json")
        self.artefacts.put_folder(self.out, key)

        def write() -> None:
            with self.job.together():
                if result.attribution is not None:
                    self.job.attribution(attribution_of(result.attribution))
                self.job.selection(selected(result.selection))
                self.job.metrics([_measurement(row) for row in result.metrics])
                self.job.publish_checkpoint(checkpoint_id, size, manifest)
                self.job.succeed()

        try:
            insist(write)
        except LeaseLost:
            if insist(lambda: self._is_published(checkpoint_id)):
                return  # committed, and the database went away before it could say so
            self.artefacts.delete(key)
            raise

    def _is_published(self, checkpoint_id: str) -> bool:
        with self.database.read() as session:
            return session.get(Checkpoint, checkpoint_id) is not None

    def _fail(self, code: str, message: str, fix: str | None) -> None:
        log.error("%s failed: %s", self.job.job_id, code)
        try:
            insist(lambda: self.job.fail(code, message, fix))
        except LeaseLost as lost:
            log.warning("%s", lost.message)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """The work folder for this process alone.

    An engine whose supervisor has just lost the lease may have seconds to live; two must not write one
    training checkpoint. The lock goes with the process, however it ends.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _measurement(row: dict[str, Any]) -> Measurement:
    return Measurement(
        row["stage"], row["set"], row["domain"] or "", row["name"], row["value"], row["n"], row["chance"]
    )


def _crash(error: Exception) -> tuple[str, str, str | None]:
    """Code, message and fix for an error nobody foresaw.

    Its own message stays out of the row and the log: it may quote the data. Its type and place do not.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return "OUT_OF_MEMORY", f"The engine ran out of memory ({where}).", MORE_MEMORY
    log.error("unforeseen error\n%s", "".join(traceback.format_tb(error.__traceback__)))
    return (
        "ENGINE_CRASHED",
        f"The engine met an error it does not know ({where}).",
        "Report it with the job's id.",
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises its own class for a GPU and a bare RuntimeError for the CPU; it is not imported for the
    # question.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _load(entry: str) -> Callable[..., Any]:
    module, name = entry.split(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def main() -> int:
    """Entry of `python -m worker.engine`."""
    lines = die_with_parent()
    stop = StopFlag()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = Settings()
    with suppress(Exception):  # the job meets the same error, and can tell somebody
        _load(settings.engine_entry)
    job_id, token = lines.get().split()
    log.info("%s starts with lease %s", job_id, token)
    return Engine(settings, job_id, int(token), stop).run()


if __name__ == "__main__":
    sys.exit(main())
