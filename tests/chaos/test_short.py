"""`make chaos` in small: a few real jobs, some kills, both lanes. The long one is docs/results/chaos.md."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from benchmarks.chaos.page import figures, text
from benchmarks.chaos.play import play
from benchmarks.chaos.service import Lane

SECONDS = 300
"""On a machine with other work; alone it takes half a minute."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own, which only its user may enter: Postgres runs as another."""
    made = Path(mkdtemp(prefix="seuf-chaos-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("lane", ["celery", "database"])
def test_nothing_is_lost_and_nothing_doubled(lane: Lane, folder: Path) -> None:
    played = play(lane, folder / lane, 2, 3, random.Random(1), SECONDS, ("paper",))
    assert played.verdict.breaches == []
    assert played.left_processes == 0
    assert sum(one.kill is not None for one in played.done) >= 3
    assert sum(played.verdict.ended.values()) >= 2
    page = text(figures({"machine": "this one"}, 1, [played]))
    assert "## 2 jobs, 3 kills" in page
