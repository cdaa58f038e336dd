"""What became of an engine that ended without writing its job's end, and why the kernel may have killed it."""

import signal
from dataclasses import dataclass
from pathlib import Path

from store.leases import Loss

STOPPED = 3
"""Exit code of an engine that stopped because it was asked to, after a training checkpoint."""
DATABASE_AWAY = 4
"""Exit code of an engine that could not reach the database for longer than a restart of it takes."""
STORAGE_AWAY = 5
"""Exit code of an engine that could not reach the storage of sets and checkpoints for so long."""

MORE_MEMORY = "Use a smaller batch_size or max_length, or a machine with more memory, then submit again."
_TRY_AGAIN = (
    "If nobody stopped it, look at the worker's log of that time. Retry the job: it goes on from its last "
    "training checkpoint."
)

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class KernelKills:
    """How many processes the kernel has killed for want of memory, where `pid` runs, when this was made.

    The counter is that of the process's control group (version 2 or 1), else that of the whole machine. It cannot
    tell one process of a group from another, so two engines in one group, one killed by the kernel and one by
    somebody else in the same moment, are both taken to have run out of memory.
    """

    file: Path
    count: int

    @classmethod
    def near(cls, pid: int, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> "KernelKills | None":
        """None where the kernel keeps no such counter."""
        for file in (*_group_files(pid, proc, cgroups), proc / "vmstat"):
            if (count := _counter(file)) is not None:
                return cls(file, count)
        return None

    def more(self) -> bool:
        """Has it killed another one since?"""
        count = _counter(self.file)
        return count is not None and count > self.count


def _group_files(pid: int, proc: Path, cgroups: Path) -> list[Path]:
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = cgroups, "memory.events"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.oom_control"
        else:
            continue
        # A container without a namespace of its own sees its group as the root, and names it as the host does.
        found += [root / path.lstrip("/") / name, root / name]
    return found


def _counter(file: Path) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def verdict(exit_code: int, kills: KernelKills | None) -> Loss:
    """Why an engine that we did not stop ended without a result.

    A signal is somebody else's doing (an operator, the kernel, a fault below Python) and may not come again. A death
    for want of memory would: the next attempt needs as much. So would an exit with a code of its own.

    Args:
        exit_code: as subprocess has it, negative for a signal.
        kills: made before the job began.
    """
    if exit_code == -signal.SIGKILL and kills is not None and kills.more():
        what = "The kernel killed the engine because memory ran out (oom_kill)."
        return Loss("OUT_OF_MEMORY", what, MORE_MEMORY, again=False)
    if exit_code < 0:
        return Loss("ENGINE_LOST", f"The engine was ended by {_name(-exit_code)}.", _TRY_AGAIN)
    if exit_code == STOPPED:
        return Loss(
            "ENGINE_LOST", "The engine was told to stop by somebody else than its worker.", _TRY_AGAIN
        )
    if exit_code == DATABASE_AWAY:
        return Loss("ENGINE_LOST", "The engine could not reach the database.", _TRY_AGAIN)
    if exit_code == STORAGE_AWAY:
        return Loss("ENGINE_LOST", "The engine could not reach the storage of files.", _TRY_AGAIN)
    return Loss(
        "ENGINE_CRASHED",
        f"The engine ended without a result (exit code {exit_code}).",
        "Look at the worker's log of that time, and report it with the job's id if it happens again.",
        again=False,
    )


def _name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
