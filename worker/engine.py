"""The engine process: `python -m worker.engine`, started by the supervisor ahead of the job it will run.

Loading the library takes seconds, so it is done before there is a job; then one line on standard input
(worker.telling.Assignment) starts it. Reads the job from the store, calls the method, publishes the checkpoint.
Ends with exit code 0 when the job's end is written (or the lease is lost); with one of worker.verdict when the
supervisor has to say what becomes of the job.
"""

import errno
import hashlib
import importlib
import logging
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from seuf_core.errors import Cancelled, DataError, SeufError
from seuf_core.method import Method
from store import checkpoints, files
from store.artefacts import Artefacts
from store.database import AWAY, Database
from store.errors import LeaseLost, StorageAway
from store.fenced import FencedJob, Measurement
from store.settings import Settings
from store.tables import Checkpoint, Job, Model
from worker import telling
from worker.folders import TRAINING, open_attempt
from worker.life import StopFlag, die_with_parent
from worker.progress import JobObserver, attribution_of, insist, selected
from worker.telling import Assignment, Phases
from worker.verdict import DATABASE_AWAY, MORE_MEMORY, STOPPED, STORAGE_AWAY

if TYPE_CHECKING:
    from seuf_core.pipeline import UnlearnResult

log = logging.getLogger("worker.engine")

MORE_ROOM = "Make room in SEUF_DATA_DIR or SEUF_ARTEFACTS_URL, then retry the job: it goes on where it was."


@dataclass(frozen=True)
class Inputs:
    """What the method is given."""

    model: Path
    forget: Path
    retain: Path | None
    evaluation: Path | None
    method: Method
    memory: int | None


class Engine:
    """One claimed job, from its row to its end."""

    def __init__(self, settings: Settings, given: Assignment, stop: Callable[[], bool]) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.artefacts = Artefacts.of(settings)
        self.job = FencedJob(self.database, given.job_id, given.token)
        self.observer = Phases(JobObserver(self.job, stop), given)

    def run(self) -> int:
        """The exit code; see above."""
        try:
            return self._run()
        except AWAY:
            log.error("%s: the database stays away", self.job.job_id)
            return DATABASE_AWAY
        except StorageAway:
            log.error("%s: the storage stays away", self.job.job_id)
            return STORAGE_AWAY
        except LeaseLost as lost:
            log.warning("%s", lost.message)
            return 0
        finally:
            self.observer.close()

    def _run(self) -> int:
        try:
            self._publish(self._call())
        except Cancelled:
            return STOPPED
        except (LeaseLost, *AWAY):
            raise
        except StorageAway as away:
            cause = away.__cause__
            if not isinstance(cause, Exception) or not _is_full(cause):
                raise
            self._fail(*_crash(cause))
        except SeufError as error:
            code = "OUT_OF_MEMORY" if error.code == "out_of_memory" else error.code
            self._fail(code, error.message, error.fix)
        except Exception as error:
            self._fail(*_crash(error))
        else:
            shutil.rmtree(self.settings.work_dir / self.job.job_id, ignore_errors=True)
        return 0

    def _call(self) -> tuple["UnlearnResult", Path]:
        """The result and the folder of its checkpoint."""
        job, model, ancestors = insist(self._rows)
        unlearn = _load(self.settings.engine_entry)
        insist(self.job.check)
        folder = open_attempt(self.settings.work_dir, self.job.job_id, self.job.token, ancestors)
        inputs = self._inputs(job, model, folder / "sets")
        result = unlearn(
            inputs.model,
            inputs.forget,
            folder / "checkpoint",
            retain=inputs.retain,
            evaluation=inputs.evaluation,
            method=inputs.method,
            work=folder / TRAINING,
            observer=self.observer,
            memory=inputs.memory,
            # Nobody writes into a file of a published checkpoint, so it may be the base's own.
            share="hardlink",
        )
        return cast("UnlearnResult", result), folder / "checkpoint"

    def _inputs(self, job: Job, model: Model, sets: Path) -> Inputs:
        forget = self._set(sets / "forget.jsonl", "/forget_set", job.forget_file, job.forget_sha256)
        assert forget is not None
        return Inputs(
            Path(model.path),
            forget,
            self._set(sets / "retain.jsonl", "/retain_set", job.retain_file, job.retain_sha256),
            self._set(
                sets / "evaluation.jsonl", "/evaluation_set", job.evaluation_file, job.evaluation_sha256
            ),
            Method.model_validate(job.method),
            job.max_memory_bytes,
        )

    def _rows(self) -> tuple[Job, Model, tuple[str, ...]]:
        """The job, its model, and the jobs that it retries, the nearest first."""
        with self.database.read() as session:
            job = session.get_one(Job, self.job.job_id)
            ancestors, before = [], job.retry_of
            while before is not None:
                ancestors.append(before)
                before = session.get_one(Job, before).retry_of
            return job, session.get_one(Model, job.model_id), tuple(ancestors)

    def _set(self, path: Path, pointer: str, file_id: str | None, sha256: str | None) -> Path | None:
        """A set as the local file `path`, once its bytes are known to be the ones that were submitted."""
        if file_id is None:
            return None
        try:
            insist(lambda: self.artefacts.fetch(files.artefact_key(file_id), path))
        except FileNotFoundError as error:
            message = (
                f"The bytes of {file_id} are gone: it was deleted, or this worker cannot see the storage."
            )
            fix = "Upload the file again and submit a new job."
            raise DataError("file_gone", message, fix, pointer) from error
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            message = f"The bytes of {file_id} are no longer those that were submitted (sha256 {found})."
            raise DataError("file_changed", message, "Upload the file again and submit a new job.", pointer)
        return path

    def _publish(self, made: tuple["UnlearnResult", Path]) -> None:
        """First the whole folder under its name, then the row and the success in one transaction.

        The lease is asked for before the name appears. Should it be lost between the two, the folder is deleted
        here, or by a sweep if this process does not live to do it (worker.sweeps).
        """
        result, out = made
        assert result.manifest is not None
        checkpoint_id = checkpoints.id_of(self.job.job_id, self.job.token)
        key = checkpoints.artefact_key(checkpoint_id)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        manifest = result.manifest.model_dump(mode="json")
        insist(self.job.check)
        insist(lambda: self.artefacts.put_folder(out, key))

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
            with suppress(StorageAway):  # then a sweep does it
                self.artefacts.delete(key)
            raise

    def _is_published(self, checkpoint_id: str) -> bool:
        with self.database.read() as session:
            return session.get(Checkpoint, checkpoint_id) is not None

    def _fail(self, code: str, message: str, fix: str | None) -> None:
        log.error("%s failed: %s", self.job.job_id, code)
        insist(lambda: self.job.fail(code, message, fix))


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
    if _is_full(error):
        return "DISK_FULL", f"There is no room left on a disk ({where}).", MORE_ROOM
    log.error("unforeseen error\n%s", "".join(traceback.format_tb(error.__traceback__)))
    return (
        "ENGINE_CRASHED",
        f"The engine met an error it does not know ({where}).",
        "Report it with the job's id.",
    )


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors has an error class of its own, which tells the system's error only in words.
    return type(error).__name__ == "SafetensorError" and f"(os error {errno.ENOSPC})" in str(error)


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises its own class for a GPU and a bare RuntimeError for the CPU; it is not imported for the
    # question.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _warm() -> None:
    """Load what transformers would only when it first opens a model: a few tenths of a second of a job's first one."""
    if "transformers" in sys.modules:
        for name in ("generation.utils", "masking_utils", "modeling_layers", "processing_utils"):
            importlib.import_module(f"transformers.{name}")


def _load(entry: str) -> Callable[..., Any]:
    module, name = entry.split(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def main() -> int:
    """Entry of `python -m worker.engine`."""
    lines = die_with_parent()
    stop = StopFlag()
    settings = Settings()
    telling.begin(settings, "seuf-engine")
    with suppress(Exception):  # the job meets the same error, and can tell somebody
        _load(settings.engine_entry)
        _warm()
    given = telling.read_line(lines.get())
    telling.engine_is_about(given)
    log.info("%s starts with lease %d", given.job_id, given.token)
    return Engine(settings, given, stop).run()


if __name__ == "__main__":
    sys.exit(main())
