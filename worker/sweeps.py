"""Bytes that no row names are deleted, and rows whose bytes are gone are reported.

Such bytes are left behind by a process that died between writing them and writing their row, or between deleting a
row and deleting its bytes. Nothing that a running process is about to name is touched:

- A checkpoint folder's name follows from a lease, so store.orphans.wanted_checkpoints knows without a clock which
  folder may still get its row. The folders are listed first and the rows are read afterwards.
- A file's bytes get their name moments before their row, from a process with no lease. So they are left alone until
  they are SEUF_ORPHAN_GRACE_SECONDS old; and a process that commits its row later than that names bytes that are
  gone, which `report_missing` tells. Bytes without a name (drafts) are safe at any age: their writer fails.
- Parts of an upload come after its row, so a folder without a row is over; the age is asked for all the same.

Whoever starts the service on a database that was restored from an older copy has that long to notice. On one that
knows nothing of what is stored, as another service's does, nothing is deleted.

A row is never deleted here: that bytes are missing is for a person to look at.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from sqlalchemy.orm import Session

from store import checkpoints, files, orphans
from store.artefacts import Artefacts
from store.database import Database
from store.settings import Settings
from worker.folders import trim

log = logging.getLogger(__name__)

FEW = 10
"""Orphans that a crash or two may leave. More of them, and nothing beside them that has a row: the wrong database."""
WORK_SECONDS = 3600
"""Between two looks at the work folders of this machine."""


def sweep_checkpoints(database: Database, settings: Settings) -> None:
    """Delete old checkpoint folders whose attempt lost its lease before their row was written."""
    grace = settings.orphan_grace_seconds
    _sweep(database, Artefacts.of(settings), "checkpoints", orphans.wanted_checkpoints, grace)


def sweep_files(database: Database, settings: Settings) -> None:
    """Delete what uploads left behind long ago: bytes of files and of parts without a row, and drafts."""
    artefacts, grace = Artefacts.of(settings), settings.orphan_grace_seconds
    _sweep(database, artefacts, "files", orphans.wanted_files, grace)
    _sweep(database, artefacts, "uploads", orphans.wanted_uploads, grace)
    if drafts := artefacts.sweep_drafts(grace):
        log.warning("%d drafts that were never completed are deleted", drafts)


def _sweep(
    database: Database,
    artefacts: Artefacts,
    prefix: str,
    wanted: Callable[[Session, Collection[str]], set[str]],
    older_than: float,
) -> None:
    stored = {Path(one.key).name.partition(".")[0]: one for one in artefacts.list(prefix)}
    with database.read() as session:
        named = wanted(session, stored)
    old = [one.key for id_, one in stored.items() if id_ not in named and one.age_seconds >= older_than]
    if not named and len(old) > FEW:
        log.error(
            "%d %s and not one of them has a row: is this their database? None is deleted", len(old), prefix
        )
        return
    for key in old:
        artefacts.delete(key)
        log.warning("%s had no row and is deleted", key)


def report_missing(database: Database, settings: Settings) -> None:
    """Log every checkpoint and file that has a row and no bytes."""
    artefacts = Artefacts.of(settings)
    with database.read() as session:
        named = [checkpoints.artefact_key(id_) for id_ in orphans.checkpoint_ids(session)]
        named += [files.artefact_key(id_) for id_ in orphans.file_ids(session)]
    there = {stored.key for prefix in ("checkpoints", "files") for stored in artefacts.list(prefix)}
    # What came or went between the two looks is looked at once more.
    for key in (key for key in named if key not in there and not artefacts.exists(key)):
        if _still_named(database, key):
            log.error("%s has a row but its bytes are gone", key)


def _still_named(database: Database, key: str) -> bool:
    prefix, name = key.split("/")
    id_ = name.partition(".")[0]
    wanted = orphans.wanted_files if prefix == "files" else orphans.wanted_checkpoints
    with database.read() as session:
        return id_ in wanted(session, [id_])


def sweep_work(database: Database, settings: Settings) -> None:
    """Delete this machine's work folders of jobs that have ended, except what a retry may go on from."""
    if not settings.work_dir.is_dir():
        return
    folders = {folder.name: folder for folder in settings.work_dir.iterdir() if folder.is_dir()}
    with database.read() as session:
        done = orphans.done_with_work(session, folders, settings.keep_work_days)
        unknown = folders.keys() - orphans.known_jobs(session, folders)
        ended = orphans.ended_jobs(session, folders) - done
    before = time.time() - settings.orphan_grace_seconds
    done |= {name for name in unknown if _changed_at(folders[name]) < before}
    for name in done:
        shutil.rmtree(folders[name], ignore_errors=True)
    for name in ended:  # of an engine that was killed together with its supervisor
        with suppress(OSError):
            trim(settings.work_dir, name)
    if done:
        log.info("%d work folders of ended jobs are deleted", len(done))


def _changed_at(folder: Path) -> float:
    return max(_mtimes((folder, *folder.rglob("*"))), default=0.0)


def _mtimes(paths: Iterable[Path]) -> Iterable[float]:
    for path in paths:
        try:
            yield path.lstat().st_mtime
        except FileNotFoundError:
            continue


def keep_work_swept(database: Database, settings: Settings) -> None:
    """Sweep the work folders now and every WORK_SECONDS, in a thread that ends with the process.

    No duty: work folders are each machine's own.
    """

    def sweep() -> None:
        while True:
            try:
                sweep_work(database, settings)
            except Exception:
                log.exception("the work folders were not swept; again in %d s", WORK_SECONDS)
            time.sleep(WORK_SECONDS)

    threading.Thread(target=sweep, name="sweep-work", daemon=True).start()
