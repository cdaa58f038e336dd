"""Shapes, tokens and rates small enough to work out by hand."""

from __future__ import annotations

from seuf_core.plan.facts import Calibration, JobTokens, LayerShape, Machine, ModelShape, TokenCounts

# One operation, one byte, one number a second: seconds are then counts.
UNIT = Calibration(
    layer_rate=1.0,
    layer_seconds=0.0,
    backward_rate=1.0,
    backward_seconds=0.0,
    head_rate=1.0,
    step_rate=1.0,
    read_rate=1.0,
    reread_rate=1e300,  # at once; JSON knows no infinity
    write_rate=1.0,
    cached=False,
    baseline_bytes=0,
)


def shape(layers: int = 4, layer_bytes: int = 1_000_000_000, **changed: object) -> ModelShape:
    """Equal sparse layers of 1 GB, each in a shard of its own; 16 experts, 2 a token; H = 100, I = 10, V = 1000."""
    fields: dict[str, object] = {
        "layers": tuple(LayerShape(layer_bytes, 4000, 400, (f"shard-{i}",)) for i in range(layers)),
        "moe_layers": tuple(range(layers)),
        "outside_bytes": 100_000_000,
        "expert": 3000,
        "router": 1600,
        "adapted": 1000,
        "width": 100,
        "vocabulary": 1000,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "number": 2,
        "shards": {f"shard-{i}": layer_bytes for i in range(layers)},
        "parameters": layers * layer_bytes // 2,
    }
    return ModelShape(**(fields | changed))  # type: ignore[arg-type]


def tokens(forget: int = 100, retain: int = 100, length: int = 10) -> JobTokens:
    """So many sequences of `length` tokens, half of them labels; 20 probes a part."""

    def some(count: int) -> TokenCounts:
        return TokenCounts.of([(length, length // 2)] * count)

    return JobTokens(some(forget), some(retain), TokenCounts(), some(20), some(20))


def with_memory(memory: int, **devices: int) -> Machine:
    """A machine that gives a job so much."""
    return Machine(memory, "what was given", devices)
