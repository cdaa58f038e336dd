"""The formulas of a plan: bytes that are in memory together, floating-point operations, and the seconds they take.

Torch-free. Letters: T tokens of a pass, P label positions, H hidden size, I expert intermediate, K experts a token,
V vocabulary, b bytes of a number of the model (2 or 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seuf_core.plan.facts import Calibration, ModelShape

# Padded tokens of a pass without gradients: of attribution, while constants are computed, and of probes.
TOKENS_PER_SCORE, TOKENS_PER_PASS, TOKENS_PER_LOOK = 1024, 2048, 4096
# Padded tokens of a pass with gradients through the whole model (the score `gradient`).
TOKENS_PER_BACKWARD = 1024
# Padded tokens of probes whose states are in memory together (seuf_core.evaluate.probes).
TOKENS_OF_A_LOOK = 1 << 15
# Hidden states and constants that are more than this are mapped files (seuf_core.moe.sweep, seuf_core.passes).
STATES_IN_MEMORY, CONSTANTS_IN_MEMORY = 256 << 20, 1 << 30
# Bytes of states that attribution leaves behind for the constants, in a mapped file (seuf_core.moe.trail).
TRAIL_BYTES = 4 << 30
# Positions that go through the head together (seuf_core.moe.head).
HEAD_CHUNK = 256

# Fitted, since what kernels use by themselves and the allocator keeps cannot be derived; torch 2.13 on a CPU:
# numbers of size H that live at once inside one layer for each token, beside the experts' own and the outputs of the
# dense matrices; and the same of what is kept for the backward pass (within 7 % of what autograd saves of OLMoE in
# fp32 and of Qwen2-MoE in bf16).
FORWARD_STATES, KEPT_STATES = 4, 5
# What the heap holds of a step's activations, in their own size: pieces that are freed out of order stay. Fitted on
# jobs of 1,024 tokens a step (benchmarks/plan.py).
STEP_SLACK = 1.8
# Seconds of a step beside its layers: constants gathered, leaves cast, the loss and its bookkeeping.
START_SECONDS = 0.01
# Bytes of a position's logits beside the logits themselves: fp32 copy, softmax, gradient in fp32.
LOGIT_BYTES = 12


def forward_bytes(shape: ModelShape, tokens: int) -> int:
    """Activations inside one decoder layer without gradients, at most: T * (b * (4 H + D + K (2 H + 3 I)) + 44 E).

    D: outputs of the layer's dense matrices. Of each (token, expert) pair the grouped product holds its input, gate
    and up, their product and its output; the router's scores take 44 bytes an expert while they are summed up.
    """
    routed = shape.num_experts_per_tok * (2 * shape.width + 3 * shape.intermediate)
    numbers = FORWARD_STATES * shape.width + shape.outputs + routed
    return tokens * (shape.number * numbers + 44 * shape.num_experts)


def kept_bytes(shape: ModelShape, tokens: int, labels: int | None = None) -> int:
    """What one decoder layer keeps for a backward pass through activations: b * (T (5 H + D) + P K (H + 3 I)).

    Weights are frozen, so a product keeps no input; what is kept are the norms' inputs, what attention and the gate's
    product multiply, and the weighted outputs of the experts, which run on P = `labels` tokens, or all T.
    """
    routed = shape.num_experts_per_tok * (shape.width + 3 * shape.intermediate)
    dense = KEPT_STATES * shape.width + shape.outputs
    return shape.number * (tokens * dense + (tokens if labels is None else labels) * routed)


def adapted_bytes(shape: ModelShape, tokens: int) -> int:
    """What adapters of one layer keep beside that: in fp32 what goes into the products of attention, 4 * 2 * T * H.

    In 16 bits each of the four casts its own: 4 * 4 * T * H. Shared experts' are left out.
    """
    return 4 * (2 if shape.number == 4 else 4) * tokens * shape.width


def head_bytes(shape: ModelShape, positions: int) -> int:
    """Logits of a chunk of positions and their graph: C * V * (b + 12), C at most 256."""
    return min(positions, HEAD_CHUNK) * shape.vocabulary * (shape.number + LOGIT_BYTES)


def logits_bytes(shape: ModelShape, positions: int) -> int:
    """The same of all positions at once: P * V * (b + 12)."""
    return positions * shape.vocabulary * (shape.number + LOGIT_BYTES)


def scaled_bytes(shape: ModelShape, tokens: int) -> int:
    """What the score `gradient` has beside a layer's own activations: T * K * H * (2 b + 4).

    Every token K times: before, while and after it is multiplied in fp32.
    """
    return tokens * shape.num_experts_per_tok * shape.width * (2 * shape.number + 4)


def states_bytes(shape: ModelShape, tokens: int) -> int:
    """Hidden states of so many tokens: T * H * b."""
    return tokens * shape.width * shape.number


def in_memory(size: int, limit: int = STATES_IN_MEMORY) -> int:
    """What of so many bytes of states is anonymous memory: all, or past the limit nothing (`sweep.States`)."""
    return size if size <= limit else 0


def trained_bytes(elements: int, looks: int, number: int = 4) -> int:
    """What n trained numbers take while they are trained: 9 numbers each, and 12 where there are several looks.

    Value, gradient and the two moments of AdamW; the value before training and that of the best step; and the last
    training checkpoint: value and both moments. While a second one is taken the one before it is still there.
    """
    return (9 if looks < 2 else 12) * number * elements


def found_bytes(elements: int, number: int = 4) -> int:
    """What is left of that when the best step is known: 5 numbers each."""
    return 5 * number * elements


def operations(shape: ModelShape, layers: Sequence[int], tokens: int, labels: int | None = None) -> int:
    """Floating-point operations of so many tokens through some layers.

    labels: where the last of them is where a pass ends, how many tokens its experts and what is beside them run on;
    None = all.
    """
    done = sum(tokens * shape.flops(layer) for layer in layers)
    if layers and labels is not None:
        done -= (tokens - min(labels, tokens)) * shape.block_flops(layers[-1])
    return done


@dataclass
class Work:
    """What a phase computes: calls of a decoder layer, operations by kind, and bytes read while it computes.

    calls, flops: of layers, forward only. backward_calls, backward_flops: of layers that are run forward and
    backward, the flops counted once for each direction. head_flops: of the output head. starts: how often constants are
    put together and the start layer is run. moved: numbers that the optimiser moves.
    read: bytes of layers that are loaded; stored: of these, what is not in the page cache; first: of these, what
    nothing is computed behind. copied: bytes of files that are copied, patched and read back. written: other bytes to
    disk.
    """

    calls: int = 0
    flops: int = 0
    backward_calls: int = 0
    backward_flops: int = 0
    head_flops: int = 0
    starts: int = 0
    moved: int = 0
    read: int = 0
    stored: int = 0
    first: int = 0
    copied: int = 0
    written: int = 0

    def layers(
        self,
        shape: ModelShape,
        layers: Sequence[int],
        tokens: int,
        passes: int = 1,
        labels: int | None = None,
    ) -> None:
        """Add: these layers run over so many tokens, in `passes` calls each; `labels`: see `operations`."""
        self.calls += passes * len(layers)
        self.flops += operations(shape, layers, tokens, labels)

    def both_ways(
        self,
        shape: ModelShape,
        layers: Sequence[int],
        tokens: int,
        passes: int,
        times: int,
        labels: int | None = None,
    ) -> None:
        """Add: `times` steps that run these layers over so many tokens forward and backward."""
        self.backward_calls += times * passes * len(layers)
        self.backward_flops += times * 2 * operations(shape, layers, tokens, labels)

    @property
    def all_flops(self) -> int:
        """Of layers and head, in both directions."""
        return self.flops + self.backward_flops + self.head_flops

    @property
    def bytes_read(self) -> int:
        """Through system calls, from the page cache too."""
        return self.read + 2 * self.copied

    @property
    def bytes_written(self) -> int:
        """To disk."""
        return self.written + self.copied

    def seconds(self, rates: Calibration) -> float:
        """Loading takes its own time, but what storage adds to that is hidden behind computing, save the first layer's.

        max(compute + load, stored - first) + first + write, with compute = calls * fixed + flops / rate of each kind,
        and stored, first in the seconds by which storage is slower than the page cache.
        """
        busy = (
            self.calls * rates.layer_seconds
            + self.flops / rates.layer_rate
            + self.backward_calls * rates.backward_seconds
            + self.backward_flops / rates.backward_rate
            + self.head_flops / rates.head_rate
            + self.starts * START_SECONDS
            + self.moved / rates.step_rate
            + self.read / rates.reread_rate
        )
        waiting = max(0.0, 1 / rates.read_rate - 1 / rates.reread_rate)
        behind = (self.stored - self.first) * waiting
        writing = (self.written + self.copied) / rates.write_rate
        return max(busy, behind) + self.first * waiting + writing


def passes(tokens: int, per_pass: int) -> int:
    """How many passes so many tokens are."""
    return -(-tokens // per_pass)
