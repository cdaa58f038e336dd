"""Four downloads at once of gigabytes: whole and exact, and the process does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from api.settings import ApiSettings
from store.database import Database
from store.keys import Keys
from tests.seeds import add_running
from tests.services import free_port, wait_until
from tests.serving import SECRET

ROOT = Path(__file__).parents[2]
GROWTH = 48 << 20
"""Bytes that the process may grow by, beyond what it has after one download: a few pieces of 1 MiB for each of four."""


class Big:
    """An API process of its own that serves one sparse file, known bytes at both ends and in the middle."""

    def __init__(self, folder: Path, template: Path, size: int) -> None:
        self.size = size
        self.marks = {0: b"first", size // 2: b"middle", size - 4: b"last"}
        (folder / "seuf.db").write_bytes(template.read_bytes())
        self.settings = ApiSettings.model_validate({"data_dir": folder, "secret": SECRET.decode()})
        stored = folder / "artefacts" / "checkpoints" / "ckpt_big"
        stored.mkdir(parents=True)
        (stored / "manifest.json").write_text("{}")
        with (stored / "w").open("wb") as file:
            file.truncate(size)
            for at, mark in self.marks.items():
                file.seek(at)
                file.write(mark)
        self._rows()
        self.url = f"http://127.0.0.1:{free_port()}"
        environment = {**os.environ, **self.settings.environment(), "SEUF_SECRET": SECRET.decode()}
        command = [
            "-m",
            "uvicorn",
            "api.main:app",
            "--port",
            self.url.rpartition(":")[2],
            "--log-level",
            "warning",
        ]
        self.process = subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT)

    def _rows(self) -> None:
        database = Database(self.settings.database_url)
        job = add_running(database)
        entry = {"name": "w", "bytes": self.size, "sha256": "0" * 64}
        with job.together():
            job.publish_checkpoint("ckpt_big", self.size, {"files": [entry]})
            job.succeed()
        with database.write() as session:
            self.key = Keys(session).create("test", SECRET).token
        database.dispose()

    def rss(self) -> int:
        """Bytes of the process that are in memory, those of mapped files left out."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10

    def get(self, start: int) -> int:
        """Download from `start` on, checking the marks; bytes that came."""
        headers = {"Authorization": f"Bearer {self.key}", "Range": f"bytes={start}-"}
        at = start
        with httpx.stream(
            "GET", f"{self.url}/checkpoints/ckpt_big/files/w", headers=headers, timeout=60
        ) as answer:
            assert answer.status_code == 206
            for piece in answer.iter_raw(1 << 20):
                for place, mark in self.marks.items():
                    if at <= place and place + len(mark) <= at + len(piece):
                        assert piece[place - at :].startswith(mark)
                at += len(piece)
        return at - start


Make = Callable[[int], Big]


@pytest.fixture
def make_big(tmp_path: Path, sqlite_template: Path) -> Iterator[Make]:
    made: list[Big] = []

    def make(size: int) -> Big:
        made.append(Big(tmp_path, sqlite_template, size))
        wait_until(lambda: answers(made[-1].url), 30, "uvicorn")
        return made[-1]

    yield make
    for big in made:
        big.process.kill()
        big.process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def check(big: Big) -> None:
    """Four at once, each from another place; and one that stops reading holds nothing up and takes no memory."""
    big.get(big.size - (32 << 20))
    before, seen, over = big.rss(), [], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(big.rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    headers = {"Authorization": f"Bearer {big.key}"}
    with (
        httpx.stream("GET", f"{big.url}/checkpoints/ckpt_big/files/w", headers=headers),
        ThreadPoolExecutor(4) as pool,
    ):
        starts = [number * (1 << 20) + number for number in range(4)]
        assert list(pool.map(big.get, starts)) == [big.size - start for start in starts]
    over.set()
    watcher.join()
    assert max(seen) - before < GROWTH, f"grew by {(max(seen) - before) >> 20} MiB"


def test_four_downloads_at_once(make_big: Make) -> None:
    check(make_big(96 << 20))


@pytest.mark.long
def test_four_downloads_of_two_gigabytes_and_more(make_big: Make) -> None:
    check(make_big((2 << 30) + 123))
