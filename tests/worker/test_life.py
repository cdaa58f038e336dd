"""The engine's ties to its supervisor, each by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import wait_until
from tests.worker.conftest import ROOT, is_alive

CHILD = """
import os, sys, time
from worker.life import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
stdin = subprocess.PIPE if sys.argv[1] == "pipe" else 0
subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdin=stdin, start_new_session=True)
time.sleep(600)
"""


STOPPED = """
import os, signal, threading
from worker.life import StopFlag
for _ in range(400):
    flag = StopFlag()
    threading.Timer(0.0005, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not flag.wait(0):
        pass
print("heard", flush=True)
"""


def test_a_signal_may_come_at_any_instruction() -> None:
    """With a threading.Event most of these runs stood still for ever, in the handler."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "heard\n", done.stderr


@pytest.mark.parametrize("tie", ["pipe", "kernel"])
def test_the_engine_dies_with_its_parent(tie: str) -> None:
    # "kernel": the child's pipe is ours and stays open, so that only the kernel's signal is left.
    command = [sys.executable, "-c", PARENT, tie, CHILD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), 5, "the child to die")


def test_a_closed_pipe_ends_the_whole_group() -> None:
    """As when the parent died before the child could ask the kernel for its signal."""
    child = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child + CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        group = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _group(path) == pid]
        assert len(group) == 2
        process.stdin.close()
        assert process.wait(5) == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(one) for one in group), 5, "the group to die")


def _group(path: Path) -> int | None:
    try:
        return os.getpgid(int(path.name))
    except ProcessLookupError:
        return None
