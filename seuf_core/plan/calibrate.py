"""What this machine does with a model, measured in a few seconds: a layer of its own, its head, its files.

No random state is touched and the model is left as it was.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from seuf_core.checkpoint.copying import copy_patched
from seuf_core.checkpoint.index import TensorRecord
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


def calibrate(view: MoEView, shape: ModelShape, work: Path) -> Calibration:
    """Measure a machine on a model.

    Memory: one layer and the activations of 256 tokens in it, forward and backward.

    Args:
        view: of the model, on the device that will be used. Afterwards it holds no layer: what the process has beside
            the embeddings is then its own, libraries warmed up.
        work: where two files of 32 MB are written and deleted.

    Layers from all over the model are loaded, twice each: at most 256 MB, and at least one.
    """
    read_rate, reread_rate, cached = _read_rates(view, shape)
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
        reread_rate=reread_rate,
        write_rate=_write_rate(work),
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


def _read_rates(view: MoEView, shape: ModelShape) -> tuple[float, float, bool]:
    """Bytes/s of layers that are loaded for the first time and again, and whether the page cache had them before."""
    before, layers = io_counters().get("read_bytes", 0), _spread(shape)
    first = sum(_loading(view, layer) for layer in layers)
    fetched = io_counters().get("read_bytes", 0) - before
    again = sum(_loading(view, layer) for layer in layers)
    read = shape.layer_bytes(layers)
    return read / first, read / min(first, again), fetched < read / 2


def _spread(shape: ModelShape) -> list[int]:
    """Layers at even distances, of READ_BYTES together, and at least one."""
    number = len(shape.layers)
    some = max(1, min(number, READ_BYTES // max(1, shape.largest_layer)))
    return [place * number // some for place in range(some)]


def _loading(view: MoEView, layer: int) -> float:
    """Seconds until a layer is in memory, which it then leaves."""
    view.weights.hold(())
    since = time.perf_counter()
    with view.weights.loaded(layer):
        return time.perf_counter() - since


def _unchanged(record: TensorRecord) -> torch.Tensor:
    raise AssertionError(record)  # nothing is patched


def _write_rate(work: Path) -> float:
    """Bytes/s of a file that is copied, read back and hashed, as a shard with changed tensors is."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(bytes(WRITE_BYTES))
        since = time.perf_counter()
        copy_patched(source, target, [], _unchanged, lambda _: None)
        return WRITE_BYTES / (time.perf_counter() - since)


def calibrate_model(folder: Path, device: torch.device | str) -> Calibration:
    """Open a model without its layers on a device and measure this machine on it; see `calibrate`.

    Raises:
        ModelError: as `seuf_core.moe.skeleton.open_model` does.
    """
    view = open_model(folder, device)
    return calibrate(view, model_shape(folder), Path(tempfile.gettempdir()))


def accelerators() -> dict[str, int]:
    """Name -> bytes that a job may have of each accelerator that torch sees."""
    free = {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return {name: int(USABLE * size) for name, size in free.items()}
