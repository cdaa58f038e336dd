"""Who killed the engine: the kernel, for want of memory, or somebody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.ids import random_base32
from worker.memory import held_bytes
from worker.verdict import DATABASE_AWAY, STOPPED, KernelKills, verdict

MIB = 1 << 20
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MiB, of whichever version this machine lets us make."""
    for root, limit in ((V1, "memory.limit_in_bytes"), (V2, "memory.max")):
        group = root / f"seuf-test-{random_base32(8)}"
        try:
            group.mkdir()
            (group / limit).write_text(str(64 * MIB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("This machine lets nobody make a control group with a limit of memory.")


def run_in(group: Path | None, program: str) -> tuple[int, KernelKills | None]:
    """Start `program` in a group once it has been looked at as the supervisor does; its exit code."""
    waits = f"import sys; sys.stdin.readline(); {program}"
    process = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE)
    if group is not None:
        (group / "cgroup.procs").write_text(str(process.pid))
    kills = KernelKills.near(process.pid)
    process.communicate(b"go\n", timeout=60)
    return process.returncode, kills


def test_a_real_kill_of_the_kernel_is_out_of_memory(small_group: Path) -> None:
    code, kills = run_in(
        small_group, f"held = bytearray({256 * MIB}); held[::4096] = b'x' * len(held[::4096])"
    )
    assert code == -signal.SIGKILL
    assert kills is not None
    assert kills.file.parent == small_group
    found = verdict(code, kills)
    assert (found.code, found.again) == ("OUT_OF_MEMORY", False)
    assert "oom_kill" in found.what


def test_a_kill_by_somebody_else_is_a_lost_attempt() -> None:
    code, kills = run_in(None, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    found = verdict(code, kills)
    assert (found.code, found.again) == ("ENGINE_LOST", True)
    assert "SIGKILL (signal 9)" in found.what


@pytest.mark.parametrize(
    ("code", "expected", "says"),
    [
        (-signal.SIGSEGV, ("ENGINE_LOST", True), "SIGSEGV (signal 11)"),
        (-signal.SIGTERM, ("ENGINE_LOST", True), "SIGTERM"),
        (-63, ("ENGINE_LOST", True), "signal 63"),
        (STOPPED, ("ENGINE_LOST", True), "somebody else"),
        (DATABASE_AWAY, ("ENGINE_LOST", True), "database"),
        (0, ("ENGINE_CRASHED", False), "exit code 0"),
        (7, ("ENGINE_CRASHED", False), "exit code 7"),
    ],
)
def test_every_other_end(code: int, expected: tuple[str, bool], says: str) -> None:
    found = verdict(code, None)
    assert (found.code, found.again) == expected
    assert says in found.what
    assert found.fix


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/engines/a", "engines/a/memory.events"),
        ("0::/docker/abc", "memory.events"),  # named as the host does, seen as the root
        ("4:memory:/engines/a", "memory/engines/a/memory.oom_control"),
        ("4:cpu,memory:/engines/a", "memory/engines/a/memory.oom_control"),
        ("4:cpu:/engines/a", None),
    ],
)
def test_the_counter_is_that_of_the_engine_s_own_group(tmp_path: Path, line: str, file: str | None) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "12").mkdir(parents=True)
    (proc / "12" / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    (proc / "vmstat").write_text("pgfault 5\noom_kill 3\n")
    counter = proc / "vmstat"
    if file is not None:
        counter = groups / file
        counter.parent.mkdir(parents=True)
        counter.write_text("low 0\noom 9\noom_kill 3\noom_group_kill 0\n")
    kills = KernelKills.near(12, proc, groups)
    assert kills is not None
    assert (kills.file, kills.count, kills.more()) == (counter, 3, False)
    counter.write_text("oom 9\noom_kill 4\n")
    assert kills.more()
    assert verdict(-signal.SIGKILL, kills).code == "OUT_OF_MEMORY"
    assert verdict(-signal.SIGSEGV, kills).code == "ENGINE_LOST"


def test_a_kernel_without_a_counter(tmp_path: Path) -> None:
    assert KernelKills.near(12, tmp_path, tmp_path) is None
    assert verdict(-signal.SIGKILL, None).code == "ENGINE_LOST"


def test_memory_of_a_group_is_that_of_all_its_processes() -> None:
    program = (
        "import os, sys\nheld = b'x' * (30 << 20)\nchild = os.fork()\n"
        "more = b'y' * (20 << 20) if child == 0 else b''\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        held = held_bytes(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert 80 * MIB < held < 140 * MIB
    assert held_bytes(process.pid) == 0
