"""(c) Writing a model in which one expert is new: write_checkpoint against save_pretrained of the whole model.

    python -m benchmarks.writing --shape qwen2-moe-1b --folder build/shapes

Four ways; the first in a process that has the model in memory, the others in one that has not:
    save_pretrained   every byte of the model is written
    first             write_checkpoint with hard links from a base it never saw: what is shared is read for its digest
    again             the same from a base whose digests it remembers: every job on a base but the first
    copied            the same without any sharing: what a file system without reflinks does by default
save_pretrained returns when the system has the bytes; `durable` is when the disk has them, as it has them when
write_checkpoint returns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from benchmarks.cells import LARGE
from benchmarks.figures import Figures
from benchmarks.measure import PeakMemory, timed
from benchmarks.setting import Setting
from seuf_core.checkpoint.copying import Share
from seuf_core.checkpoint.delta_file import DELTA, read_delta, write_delta
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.inspect import read_config
from seuf_core.checkpoint.reader import CheckpointReader, tensor_bytes
from seuf_core.checkpoint.writer import plan, write_checkpoint
from seuf_core.families import family_of
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.view import moe_view

Found = dict[str, tuple[float, str]]  # name -> value and unit
Turn = dict[str, float]

LARGE_ROUNDS: Final = 2
SHARES: Final[dict[str, Share]] = {"first": "hardlink", "again": "hardlink", "copied": "copy"}


def called(function: Callable[..., Any], *args: Any) -> Any:
    """What the function gives, in this process."""
    return function(*args)


def run(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Measure every shape that is not there yet."""
    for shape in setting.shapes:
        if f"writing/{shape}/delta/seconds" in figures:
            continue
        base, layer = setting.checkpoint(shape), setting.layers(shape)["middle"]
        rounds = min(setting.rounds, LARGE_ROUNDS) if shape in LARGE else setting.rounds
        with TemporaryDirectory(dir=setting.folder) as scratch:
            for name, (value, unit) in measure_writing(
                base, Path(scratch), layer, rounds, setting.apart
            ).items():
                figures.add(f"writing/{shape}/{name}", value, unit)
        save()


def measure_writing(
    base: Path, scratch: Path, layer: int, rounds: int, apart: Callable[..., Any] = called
) -> Found:
    """Seconds, bytes given to the disk and memory of each way, medians of `rounds`, and the same of the delta file.

    Each in a process of its own, as each is used: who calls save_pretrained has the model in memory, and what
    write_checkpoint reads was read by the job a moment ago. Disk: twice the model's bytes. `anonymous` of
    save_pretrained is with the model, of the others what they add.

    Args:
        base: folder of the model; scratch: an empty folder on the same file system.
        layer: in which expert 0 is replaced.
        apart: calls a function with its arguments, in another process if it is to.

    Raises:
        AssertionError: what was written is not what from_pretrained gives back.
    """
    changed = new_expert(base, layer)
    written = scratch / "written"
    write_checkpoint(base, written, changed, "benchmark", share="copy")
    found = delta_figures(base, written / DELTA, scratch, changed, rounds)
    saved = apart(_saving, base, written, changed, rounds)
    return _summary({"save_pretrained": saved, **apart(_writing, base, written, changed, rounds)}) | found


def _saving(base: Path, written: Path, changed: Mapping[str, torch.Tensor], rounds: int) -> list[Turn]:
    """Turns of save_pretrained, on the model that was written, which is checked and deleted."""
    model = AutoModelForCausalLM.from_pretrained(written, dtype="auto")
    check_equal(model, base, changed)
    shutil.rmtree(written)
    save = partial(_save, model, base, written)
    return [_turn(save, written) for _ in range(1 + rounds)][1:]  # the first does not count


def _writing(
    base: Path, written: Path, changed: Mapping[str, torch.Tensor], rounds: int
) -> dict[str, list[Turn]]:
    """Turns of write_checkpoint, its ways one after the other in every round."""
    turns: dict[str, list[Turn]] = {name: [] for name in SHARES}
    for _ in range(1 + rounds):
        for name, taken in turns.items():
            write = partial(write_checkpoint, base, written, changed, "benchmark", share=SHARES[name])
            with digests_in(written.parent / name, empty=name == "first"):
                taken.append(_turn(write, written))
    return {name: taken[1:] for name, taken in turns.items()}  # the first does not count


def _save(model: Any, base: Path, out: Path) -> None:
    """As large shards as the base has."""
    model.save_pretrained(out, max_shard_size=max(shard.size for shard in read_index(base).shards))


def _turn(write: Callable[[], object], written: Path) -> Turn:
    before = _bytes_written()
    with PeakMemory() as idle:
        pass
    with PeakMemory() as memory:
        seconds, _ = timed(write)
    more, _ = timed(lambda: subprocess.run(["sync", "-f", written.parent], check=True))
    turn = {"seconds": seconds, "durable": seconds + more, "bytes": float(_bytes_written() - before)}
    shutil.rmtree(written)
    return turn | {"anonymous": float(memory.anonymous), "added": float(memory.anonymous - idle.anonymous)}


def _bytes_written() -> int:
    """Bytes of this process that go to a disk, so far: by pages made dirty, however they were (write or mapping)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"])


def _summary(turns: Mapping[str, list[Turn]]) -> Found:
    middle = {
        name: {key: median(turn[key] for turn in taken) for key in taken[0]} for name, taken in turns.items()
    }
    found: Found = {}
    for name, turn in middle.items():
        whole = name == "save_pretrained"
        found[f"{name}/seconds"] = turn["seconds"], "s"
        found[f"{name}/durable"] = turn["durable"], "s"
        found[f"{name}/bytes"] = turn["bytes"], "B"
        found[f"{name}/anonymous"] = turn["anonymous" if whole else "added"], "B"
        found[f"{name}/times"] = middle["save_pretrained"]["seconds"] / turn["seconds"], "x"
    return found


def delta_figures(
    base: Path, delta: Path, scratch: Path, changed: Mapping[str, torch.Tensor], rounds: int
) -> Found:
    """Seconds to write the delta file, to the disk, and its bytes, alone and as a share of the model's."""
    planned, (_, facts), copy = plan(base, changed), read_delta(delta), scratch / DELTA
    seconds = []
    for _ in range(1 + rounds):
        values = map(planned.on_disk, planned.records)
        seconds.append(timed(partial(write_delta, copy, planned.records, values, facts))[0])
    assert copy.read_bytes() == delta.read_bytes()
    size = delta.stat().st_size
    of_all = sum(record.bytes for record in planned.index.tensors.values())
    return {
        "delta/seconds": (median(seconds[1:]), "s"),
        "delta/bytes": (size, "B"),
        "delta/share": (size / of_all, "1"),
    }


def new_expert(base: Path, layer: int) -> dict[str, torch.Tensor]:
    """Expert 0 of a layer with noise of a tenth of its own size, by name on disk, in float32 as training has it."""
    family, generator = family_of(read_config(base)["model_type"]), torch.Generator().manual_seed(0)
    changed = {}
    with CheckpointReader(base) as reader:
        for name in [name for names in family.expert_names(layer, 0).values() for name in names]:
            tensor = reader.tensor(name).float()
            changed[name] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return changed


def check_equal(model: Any, base: Path, changed: Mapping[str, torch.Tensor]) -> None:
    """Assert that a loaded model is the base with `changed` in it, bit for bit. Memory: one tensor."""
    seen = set()
    with CheckpointReader(base) as reader:
        for name, tensor in all_tensors(moe_view(model)).items():
            whole = reader.tensor(name)
            wanted = changed[name].to(whole.dtype) if name in changed else whole
            assert bytes(tensor_bytes(tensor.contiguous())) == bytes(tensor_bytes(wanted)), name
            seen.add(name)
        assert seen >= changed.keys()
        assert seen == reader.index.tensors.keys()


@contextmanager
def digests_in(folder: Path, *, empty: bool) -> Iterator[None]:
    """Digests of a base's shards are remembered in `folder`; `empty`: none yet."""
    if empty:
        shutil.rmtree(folder, ignore_errors=True)
    before = os.environ.get("SEUF_CACHE")
    os.environ["SEUF_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["SEUF_CACHE"]
        if before is not None:
            os.environ["SEUF_CACHE"] = before


def main() -> None:
    """Print the figures of one shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2-moe-1b", help="of benchmarks.shapes")
    parser.add_argument("--folder", type=Path, default=Path("build/shapes"), help="of the checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = Figures()
    run(Setting(options.folder, (options.shape,), rounds=options.rounds), figures, lambda: None)
    for name, value in figures.values().items():
        print(f"{value:14,.4f}  {name}")


if __name__ == "__main__":
    main()
