"""The work folders of engines: <work>/<job>/<lease token>, one for each attempt.

What an attempt writes lies under its own token, so one that lost its lease without knowing it (a process that was
stopped and goes on) cannot touch a byte of its successor's. The successor takes over training checkpoints as links:
they are never written in place, only replaced.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

TRAINING = "training"
_DRAFT = ".inherited"


def open_attempt(work: Path, job_id: str, token: int, ancestors: Sequence[str] = ()) -> Path:
    """The folder of a new attempt. Its folder TRAINING holds the training checkpoints to go on from.

    They are those of the newest attempt of this job that saved any, else of the jobs that it retries (`ancestors`,
    nearest first). Older attempts of this job leave nothing else behind. Call it once for a token, with the lease.
    """
    mine = work / job_id / str(token)
    mine.mkdir(parents=True)
    older = [folder for folder in _attempts(work / job_id) if int(folder.name) < token]
    _inherit(mine, [*older, *(folder for ancestor in ancestors for folder in _attempts(work / ancestor))])
    for folder in older:
        shutil.rmtree(folder, ignore_errors=True)
    return mine


def trim(work: Path, job_id: str, token: int | None = None) -> None:
    """Leave nothing of an attempt that is over but its training checkpoints: no set, no half-written checkpoint.

    Of every attempt without a token: for a job that has ended.
    """
    for attempt in _attempts(work / job_id):
        if token is None or attempt.name == str(token):
            for entry in attempt.iterdir():
                if entry.name != TRAINING:
                    _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def newest_training(work: Path, job_id: str) -> Path | None:
    """Where the newest training checkpoints of a job lie, if it has any here."""
    return next((folder / TRAINING for folder in _attempts(work / job_id) if _saved(folder)), None)


def _attempts(folder: Path) -> list[Path]:
    """The folders of a job's attempts, the newest first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.name.isdecimal()]
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def _saved(attempt: Path) -> list[Path]:
    return sorted((attempt / TRAINING).glob("*.safetensors"))


def _inherit(mine: Path, sources: Sequence[Path]) -> None:
    draft = mine / _DRAFT
    for source in sources:
        draft.mkdir()
        try:
            for file in _saved(source):
                _link(file, draft / file.name)
        except OSError:  # it was swept meanwhile; and a job without a training checkpoint only starts over
            shutil.rmtree(draft)
            continue
        if any(draft.iterdir()):
            break
        draft.rmdir()
    if draft.exists():
        # One rename: an attempt that is killed here leaves all of them to the next one, or is no source itself.
        draft.rename(mine / TRAINING)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)
