"""Work folders: each attempt has its own, and goes on from the training checkpoints of the one before."""

from __future__ import annotations

from pathlib import Path

from worker.folders import TRAINING, newest_training, open_attempt, trim


def save(attempt: Path, **files: str) -> None:
    """As training saves: a draft, renamed over what is there."""
    (attempt / TRAINING).mkdir(exist_ok=True)
    for name, text in files.items():
        draft = attempt / TRAINING / f"{name}.partial"
        draft.write_text(text)
        draft.replace(attempt / TRAINING / f"{name}.safetensors")


def saved(attempt: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (attempt / TRAINING).iterdir()}


def test_the_first_attempt_starts_with_nothing(tmp_path: Path) -> None:
    assert list(open_attempt(tmp_path, "job_a", 1).iterdir()) == []


def test_an_attempt_goes_on_from_the_newest_that_saved_and_clears_the_older_ones(tmp_path: Path) -> None:
    first = open_attempt(tmp_path, "job_a", 1)
    save(first, rung_0="one", rung_1="half")
    (first / TRAINING / "rung_2.partial").write_text("half")
    second = open_attempt(tmp_path, "job_a", 3)
    assert saved(second) == {"rung_0.safetensors": "one", "rung_1.safetensors": "half"}
    save(second, rung_1="whole")
    third = open_attempt(tmp_path, "job_a", 4)
    assert saved(third) == {"rung_0.safetensors": "one", "rung_1.safetensors": "whole"}
    assert [path.name for path in (tmp_path / "job_a").iterdir()] == ["4"]


def test_one_that_was_killed_before_it_inherited_hides_nothing(tmp_path: Path) -> None:
    save(open_attempt(tmp_path, "job_a", 1), rung_0="one")
    half = tmp_path / "job_a" / "2"
    (half / ".inherited").mkdir(parents=True)
    assert saved(open_attempt(tmp_path, "job_a", 3)) == {"rung_0.safetensors": "one"}


def test_a_stopped_engine_that_goes_on_cannot_touch_its_successor(tmp_path: Path) -> None:
    stale = open_attempt(tmp_path, "job_a", 1)
    save(stale, rung_0="one")
    current = open_attempt(tmp_path, "job_a", 2)
    stale.mkdir(exist_ok=True)  # as saving does
    save(stale, rung_0="stale", rung_1="stale")
    assert saved(current) == {"rung_0.safetensors": "one"}


def test_older_tokens_leave_newer_ones_alone(tmp_path: Path) -> None:
    newer = open_attempt(tmp_path, "job_a", 5)
    save(newer, rung_0="five")
    older = open_attempt(tmp_path, "job_a", 4)
    assert not (older / TRAINING).exists()
    assert saved(newer) == {"rung_0.safetensors": "five"}


def test_a_retry_goes_on_from_the_nearest_job_that_saved_and_leaves_it_whole(tmp_path: Path) -> None:
    grand = open_attempt(tmp_path, "job_a", 2)
    save(grand, rung_0="one")
    open_attempt(tmp_path, "job_b", 1, ["job_a"])
    (tmp_path / "job_b" / "1" / TRAINING).rename(tmp_path / "gone")
    retry = open_attempt(tmp_path, "job_c", 1, ["job_b", "job_a", "job_unknown"])
    assert saved(retry) == {"rung_0.safetensors": "one"}
    save(retry, rung_0="two")
    assert saved(grand) == {"rung_0.safetensors": "one"}
    assert newest_training(tmp_path, "job_a") == grand / TRAINING


def test_trimming_keeps_training_checkpoints_only(tmp_path: Path) -> None:
    attempts = [tmp_path / "job_a" / token for token in ("1", "2")]
    for attempt in attempts:
        attempt.mkdir(parents=True)
        save(attempt, rung_0="x")
        (attempt / "sets").mkdir()
        (attempt / "sets" / "forget.jsonl").write_text("secret")
    trim(tmp_path, "job_a", 1)
    assert [path.name for path in attempts[0].iterdir()] == [TRAINING]
    assert sorted(path.name for path in attempts[1].iterdir()) == ["sets", TRAINING]
    trim(tmp_path, "job_a")
    assert [path.name for path in attempts[1].iterdir()] == [TRAINING]
