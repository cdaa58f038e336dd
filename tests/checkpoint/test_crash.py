"""Killed, stopped, out of disk: at the output's place there is the whole checkpoint or nothing."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seuf_core.checkpoint import staging
from seuf_core.checkpoint.copying import Share
from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.checkpoint.manifest import read_manifest, verify_files
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.errors import ModelError, WriteError
from tests.checkpoint.edits import contents, edited, names

CHANGED = edited("olmoe", layer=1, expert=3)[1]


def _write(
    base: Path, out: Path, progress: Callable[[int, int], None] | None = None, share: Share = "reflink"
) -> None:
    write_checkpoint(base, out, CHANGED, "test", progress=progress, share=share)


def _in_child(act: Callable[[], None]) -> int:
    """Run `act` in a forked child; its wait status. The child never returns into pytest."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _kill_at(call: int) -> Callable[[int, int], None]:
    count = iter(range(call + 1))

    def progress(done: int, total: int) -> None:
        if next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def _is_whole(out: Path, like: Path) -> bool:
    verify_files(out, read_manifest(out))
    return contents(out) == contents(like)


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """The checkpoint as an undisturbed writer leaves it, and how often it reported progress."""
    out, calls = tmp_path_factory.mktemp("undisturbed") / "out", []
    _write(models("olmoe"), out, lambda *at: calls.append(at))
    return SimpleNamespace(out=out, calls=len(calls))


@pytest.mark.parametrize("share", ["reflink", "hardlink"])
def test_killed_after_any_step_leaves_nothing_and_the_next_run_succeeds(
    models, tmp_path, undisturbed, share, monkeypatch
):
    monkeypatch.setenv("SEUF_CACHE", os.devnull)  # no digest is remembered: every file is a step each time
    base, out = models("olmoe"), tmp_path / "out"
    before = contents(base)
    assert undisturbed.calls > 15  # the start, each file, config, delta, manifest
    for call in range(undisturbed.calls):
        status = _in_child(lambda call=call: _write(base, out, _kill_at(call), share))
        assert os.WIFSIGNALED(status), call
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert names(tmp_path) == ["out.partial"], call
        if call < undisturbed.calls - 3:  # until the config is there, not even the leftover is a model
            with pytest.raises(ModelError):
                inspect_model(tmp_path / "out.partial")
    _write(base, out, share=share)
    assert _is_whole(out, undisturbed.out)
    assert names(tmp_path) == ["out"]
    assert contents(base) == before


def test_killed_from_outside_at_any_moment(models, tmp_path, undisturbed):
    """The moments in between, wherever they fall: 25 delays over the time an undisturbed child takes."""
    base = models("olmoe")
    start = time.monotonic()
    assert _in_child(lambda: _write(base, tmp_path / "timed")) == 0
    seconds = time.monotonic() - start
    killed = 0
    for attempt in range(25):
        out = tmp_path / f"out-{attempt}"
        child = os.fork()
        if child == 0:
            _write(base, out)
            os._exit(0)
        time.sleep(seconds * attempt / 25)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not out.exists() or _is_whole_but_marker(out, undisturbed.out)
    assert killed >= 5


def _is_whole_but_marker(out: Path, like: Path) -> bool:
    # Killed between the rename and the removal of the marker, an empty file.
    (out / staging.MARKER).unlink(missing_ok=True)
    return _is_whole(out, like)


def test_a_disk_that_fills_up(models, tmp_path):
    """A file size limit stands for it: the kernel refuses the write in the middle of a shard."""
    base, out = models("olmoe", "1GB"), tmp_path / "out"

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(WriteError) as caught:
            _write(base, out)
        assert caught.value.code == "disk_full"
        assert caught.value.fix is not None

    assert _in_child(act) == 0
    assert names(tmp_path) == []


def test_too_little_space_is_refused_before_writing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WriteError, match="has 1000 free") as caught:
        _write(models("olmoe"), tmp_path / "out")
    assert caught.value.code == "disk_full"
    assert names(tmp_path) == []


def test_an_exception_from_the_caller_stops_and_cleans_up(models, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(models("olmoe"), tmp_path / "out", stop)
    assert names(tmp_path) == []


@pytest.mark.parametrize("share", ["reflink", "hardlink", "copy"])
def test_a_cancelled_or_failed_write_leaves_the_base_alone(own, tmp_path, share):
    base = own("olmoe")
    before, facts = contents(base), {path: path.stat() for path in base.iterdir()}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write(base, tmp_path / "out", stop, share)
    assert names(tmp_path) == [base.name]
    assert contents(base) == before
    for path, then in facts.items():
        now = path.stat()
        assert (now.st_mode, now.st_nlink, now.st_mtime_ns) == (then.st_mode, 1, then.st_mtime_ns)


def test_two_writers_of_one_output(models, tmp_path, undisturbed):
    """The second is told; the first is not disturbed."""
    codes: list[str] = []

    def second(done: int, total: int) -> None:
        if not codes:
            with pytest.raises(WriteError) as caught:
                _write(models("olmoe"), tmp_path / "out")
            codes.append(caught.value.code)

    _write(models("olmoe"), tmp_path / "out", second)
    assert codes == ["output_busy"]
    assert _is_whole(tmp_path / "out", undisturbed.out)


def test_an_output_that_appears_meanwhile_is_not_replaced(models, tmp_path):
    def appear(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(WriteError) as caught:
        _write(models("olmoe"), tmp_path / "out", appear)
    assert caught.value.code == "output_exists"
    assert names(tmp_path / "out") == []
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_written(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError) as caught:
        _write(models("olmoe"), tmp_path / "file" / "out")
    assert caught.value.code == "write_failed"


def test_no_descriptor_is_left_open(models, tmp_path):
    before = names(Path("/proc/self/fd"))
    _write(models("olmoe"), tmp_path / "out")
    with pytest.raises(WriteError):
        _write(models("olmoe"), tmp_path / "out")
    assert len(names(Path("/proc/self/fd"))) == len(before)


def test_the_edit_is_a_real_one():
    assert len(CHANGED) == 4
    assert all(torch.isfinite(tensor).all() for tensor in CHANGED.values())
