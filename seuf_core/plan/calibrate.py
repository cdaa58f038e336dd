"""What this machine does with a model, measured in a few seconds: a layer of its own, its head, its files.

No random state is touched and the model is left as it was.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from seuf_core.checkpoint.reader import CheckpointReader
from seuf_core.data.batches import Encoded, collate
from seuf_core.moe.passes import Flow, Route, embed, run_layer, tail
from seuf_core.moe.skeleton import open_model
from seuf_core.moe.view import MoEView
from seuf_core.plan.facts import USABLE, Calibration, ModelShape, model_shape
from seuf_core.plan.measure import anonymous_bytes, give_back, io_counters

# Tokens of the two passes through a layer: what both cost is its own, what the larger costs more is its tokens'.
FEW, MANY = 32, 256
SEQUENCE = 64
POSITIONS = 128
# Any token will do: routers of a real model spread even these.
FEWEST_WORDS = 128
READ_BYTES = 256 << 20
WRITE_BYTES = 32 << 20
# The best of at least so many runs, and of as many as take so long: what else the machine did is no part of a job.
REPEATS, REPEAT_SECONDS = 3, 0.05


def calibrate(view: MoEView, folder: Path, shape: ModelShape, work: Path) -> Calibration:
    """Measure a machine on a model.

    Memory: one layer and the activations of 256 tokens in it, forward and backward.

    Args:
        view: of the model, on the device that will be used. Afterwards it holds no layer: what the process has beside
            the embeddings is then its own, libraries warmed up.
        folder: of the model; at most 256 MB of it are read, spread over all layers.
        work: where a file of at most 32 MB is written and deleted.
    """
    read_rate, cached = _read_rate(folder)
    layer = _layer(view)
    flops, device = shape.flops(layer), view.model.device
    view.model.requires_grad_(False)
    with view.weights.loaded(layer):
        forward = [_seconds(_forward(view, layer, n), device) for n in (FEW, MANY)]
        both = [_seconds(_both_ways(view, layer, n), device) for n in (FEW, MANY)]
    head_seconds, step_rate = _head_seconds(view, shape.width), _step_rate(shape, device)
    view.weights.hold(())
    layer_seconds, layer_rate = _line(forward, flops)
    backward_seconds, backward_rate = _line(both, 2 * flops)
    return Calibration(
        layer_rate=layer_rate,
        layer_seconds=layer_seconds,
        backward_rate=backward_rate,
        backward_seconds=backward_seconds,
        head_rate=POSITIONS * shape.head_flops / head_seconds,
        step_rate=step_rate,
        read_rate=read_rate,
        write_rate=_write_rate(work, min(WRITE_BYTES, shape.bytes)),
        cached=cached,
        baseline_bytes=_own_bytes(view, shape),
        device=str(device),
    )


def _layer(view: MoEView) -> int:
    """A sparse layer from the middle; of a family whose layers hand something on, the first, which needs nothing."""
    if view.family.carries is not None:
        return 0
    indices = view.layer_indices or range(view.num_layers)
    return indices[len(indices) // 2]


def _begin(view: MoEView, tokens: int) -> tuple[Flow, Route]:
    size = min(tokens, SEQUENCE)
    rows = [
        Encoded([(first + place * 7919) % FEWEST_WORDS for place in range(size)], 1, truncated=False)
        for first in range(0, tokens, size)
    ]
    return embed(view, collate(rows).to(view.model.device))


@torch.no_grad()
def _forward(view: MoEView, layer: int, tokens: int) -> Callable[[], None]:
    flow, routed = _begin(view, tokens)

    @torch.no_grad()
    def run() -> None:
        run_layer(view, layer, flow, routed)

    return run


def _both_ways(view: MoEView, layer: int, tokens: int) -> Callable[[], None]:
    with torch.no_grad():
        flow, routed = _begin(view, tokens)

    def run() -> None:
        states = flow.states.detach().clone().requires_grad_()
        run_layer(view, layer, Flow(states, flow.carried), routed).states.float().sum().backward()

    return run


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The best of a few runs after one that warms up."""
    run()
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < REPEAT_SECONDS:
        _wait(device)
        since = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - since)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(seconds: Sequence[float], flops: int) -> tuple[float, float]:
    """Seconds of a call whatever its tokens, and FLOP/s beyond: the line through both passes."""
    few, many = seconds
    each = max((many - few) / (MANY - FEW), many / MANY / 10)
    return max(0.0, many - MANY * each), flops / each


def _head_seconds(view: MoEView, width: int) -> float:
    states = torch.ones(POSITIONS, width, dtype=view.model.dtype, device=view.model.device)

    @torch.no_grad()
    def run() -> None:
        tail(view, states)

    return _seconds(run, view.model.device)


def _own_bytes(view: MoEView, shape: ModelShape) -> int:
    """Anonymous memory without the model: libraries, their buffers, the texts."""
    give_back()
    on_host = shape.outside_bytes if view.model.device.type == "cpu" else 0
    return max(0, anonymous_bytes() - on_host)


def _step_rate(shape: ModelShape, device: torch.device) -> float:
    elements = min(max(shape.expert, 1 << 16), 1 << 22)
    leaf = torch.nn.Parameter(torch.ones(elements, device=device))
    leaf.grad = torch.ones_like(leaf)
    optimizer = torch.optim.AdamW([leaf], lr=1e-4, weight_decay=0.0, fused=True)

    def run() -> None:
        optimizer.step()

    return leaf.numel() / _seconds(run, device)


def _read_rate(folder: Path) -> tuple[float, bool]:
    """Bytes/s of tensors from all over the files, and whether most of them came from the page cache."""
    before, read, taken = io_counters(), 0, 0.0
    with CheckpointReader(folder) as reader:
        records = list(reader.index.tensors.values())
        every = max(1, sum(record.bytes for record in records) // READ_BYTES)
        for record in records[::every]:
            if read >= READ_BYTES:
                break
            since = time.perf_counter()
            reader.tensor(record.name)
            taken += time.perf_counter() - since
            read += record.bytes
    fetched = io_counters().get("read_bytes", 0) - before.get("read_bytes", 0)
    return read / max(taken, 1e-9), fetched < read / 2


def _write_rate(work: Path, size: int) -> float:
    work.mkdir(parents=True, exist_ok=True)
    content = bytes(size)
    with tempfile.TemporaryFile(dir=work) as file:
        since = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - since)


def calibrate_model(folder: Path, device: torch.device | str) -> Calibration:
    """Open a model without its layers on a device and measure this machine on it; see `calibrate`.

    Raises:
        ModelError: as `seuf_core.moe.skeleton.open_model` does.
    """
    view = open_model(folder, device)
    return calibrate(view, folder, model_shape(folder), Path(tempfile.gettempdir()))


def accelerators() -> dict[str, int]:
    """Name -> bytes that a job may have of each accelerator that torch sees."""
    free = {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return {name: int(USABLE * size) for name, size in free.items()}
