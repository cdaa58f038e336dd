"""What each phase of a job holds, reads and computes, for one residency of the weights. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.plan import costs
from seuf_core.plan.costs import Work, passes
from seuf_core.plan.facts import BASELINE_BYTES, Calibration, JobTokens, ModelShape, TokenCounts

Residency = Literal["whole", "suffix", "streamed"]

# Parts of memory that stay on the host when the model is on an accelerator.
ON_HOST: Final = frozenset({"process", "constants"})
# Phases that every further learning rate repeats.
REPEATED: Final = frozenset({"unlearning"})
# Passes over the test part: before and after, each with and without the targets masked.
STAGES, MASKED_STAGES = 2, 4


@dataclass(frozen=True)
class Targets:
    """What is trained: target layers, ascending, and how many experts in all; nothing where no expert is chosen.

    guessed: whether that is the worst case and not yet known.
    """

    layers: tuple[int, ...] = ()
    experts: int = 0
    guessed: bool = False


def worst_targets(shape: ModelShape, method: Method) -> Targets:
    """The worst that a method may choose: as many layers as its spread allows, from the lowest sparse one on.

    With `experts: auto` one expert in every sparse layer is taken, which is the first round of `one_per_layer`; a
    selection that grows past it takes more. With scope esft the experts are those of a router without preferences.
    """
    sparse = shape.moe_layers
    if not method.selects_experts or not sparse:
        return Targets()
    if method.scope == "esft":
        each = max(1, round(method.esft_share * shape.num_experts))
        return Targets(sparse, each * len(sparse), guessed=True)
    most = len(sparse) if method.max_experts == "auto" else min(len(sparse), method.max_experts)
    experts = most if method.experts == "auto" else method.experts
    layers = sparse[:1] if method.spread == "same_layer" else sparse[:experts]
    return Targets(layers, experts, guessed=True)


@dataclass(frozen=True)
class Setting:
    """One job on one model, and how its weights are kept."""

    shape: ModelShape
    tokens: JobTokens
    method: Method
    targets: Targets
    calibration: Calibration | None
    residency: Residency = "whole"
    micro: int = 0

    @property
    def start(self) -> int:
        """The lowest layer that is trained: below it nothing changes. 0 where everything is."""
        return self.targets.layers[0] if self.targets.layers else 0

    @property
    def top(self) -> int:
        """The highest layer that a step runs: RMU's, or the last one."""
        last = len(self.shape.layers) - 1
        if self.method.objective not in HIDDEN_STATE_OBJECTIVES:
            return last
        if self.method.rmu_layer != "auto":
            return min(self.method.rmu_layer, last)
        return self.targets.layers[-1] if self.targets.layers else last

    @property
    def steps_layers(self) -> range:
        """The layers that a step runs."""
        return range(self.start, self.top + 1)

    @property
    def suffix(self) -> range:
        """The layers from the lowest trained one on."""
        return range(self.start, len(self.shape.layers))

    @property
    def batch(self) -> TokenCounts:
        """Everything that goes through in one step, padded."""
        size, tokens = self.method.batch_size, self.tokens
        retain = tokens.retain if self.method.retain_loss != "none" else TokenCounts()
        parts = tokens.forget.batch(size) + retain.batch(size) + tokens.alternatives.batch(size)
        return replace(parts, tokens=parts.sequences * parts.longest)

    @property
    def everything(self) -> TokenCounts:
        """All sequences whose states at the start layer are kept."""
        tokens = self.tokens
        return tokens.forget + tokens.retain + tokens.alternatives + tokens.selection

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        shape, method = self.shape, self.method
        if method.scope == "full":
            return shape.parameters
        if method.scope == "lora":
            return method.lora_rank * shape.adapted
        experts = 0 if method.scope == "router_only" else self.targets.experts * shape.expert
        return experts + (len(self.targets.layers) * shape.router if method.trains_router else 0)

    @property
    def seen(self) -> float:
        """Share of tokens that the targets of the start layer see: twice the even share of as many experts."""
        if not self.targets.layers:
            return 1.0
        each = self.targets.experts / len(self.targets.layers)
        return min(1.0, 2 * each * self.shape.num_experts_per_tok / self.shape.num_experts)

    def layers_held(self, training: bool) -> int:
        """Bytes of decoder layers in memory: before training all, or one at a time."""
        shape = self.shape
        if self.residency == "whole":
            return shape.layer_bytes(range(len(shape.layers)))
        streamed = shape.largest_layer
        if not training:
            return streamed
        if self.residency == "suffix":
            return shape.layer_bytes(self.suffix)
        return shape.layer_bytes(self.targets.layers) + streamed

    def base_memory(self, training: bool) -> dict[str, int]:
        """What every phase has: the process, what is outside the layers, and the layers."""
        measured = self.calibration.baseline_bytes if self.calibration else BASELINE_BYTES
        return {
            "process": measured,
            "outside": self.shape.outside_bytes,
            "layers": self.layers_held(training),
        }


@dataclass(frozen=True)
class Draft:
    """A phase before there are seconds: its work, and bytes by what they are for."""

    name: str
    work: Work
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of everything together."""
        return sum(self.memory.values())


def drafts(setting: Setting) -> tuple[Draft, ...]:
    """Every phase of the job, in order."""
    attributed = (attributing(setting),) if setting.method.selects_experts else ()
    kept = (constants(setting),) if setting.targets.layers else ()
    return (*attributed, *kept, unlearning(setting), evaluating(setting), publishing(setting))


def attributing(setting: Setting) -> Draft:
    """All layers in turn over both halves of each set: layers + states of every token (T * H * b; a file past 256 MB)
    + one pass's activations.

    The score `gradient` goes forward once more and back: of one batch what a layer keeps.
    """
    shape, method, tokens = setting.shape, setting.method, setting.tokens
    sets = [tokens.forget] + ([tokens.retain] if method.attribution == "contrast" else [])
    halves = [-(-one.tokens // 2) for one in sets for _ in range(2)]
    layers, read = range(len(shape.layers)), sum(one.tokens for one in sets)
    work = Work(read=shape.bytes, first=shape.outside_bytes + shape.layers[0].bytes)
    if setting.residency == "whole":
        work.first = shape.bytes
    work.layers(shape, layers, read, sum(passes(half, costs.TOKENS_PER_SCORE) for half in halves))
    memory = setting.base_memory(training=False) | {
        "states": costs.in_memory(costs.states_bytes(shape, read)),
        "activations": costs.forward_bytes(shape, min(max(halves), costs.TOKENS_PER_SCORE)),
        "statistics": 2 * sum(one.labels for one in sets) * len(shape.moe_layers) * shape.num_experts_per_tok,
    }
    if method.attribution == "gradient":
        times = passes(tokens.forget.tokens, costs.TOKENS_PER_BACKWARD)
        work.layers(shape, layers, tokens.forget.tokens, times)
        work.both_ways(shape, layers, tokens.forget.tokens, times, 1)
        work.head_flops += 2 * tokens.forget.labels * shape.head_flops
        if setting.residency != "whole":
            work.read += 2 * shape.layer_bytes(layers)
        back = min(tokens.forget.tokens, costs.TOKENS_PER_BACKWARD)
        memory["activations"] = max(
            memory["activations"], costs.kept_bytes(shape, back) + costs.forward_bytes(shape, back)
        )
        memory["head"] = costs.head_bytes(shape, back)
    return Draft("attributing", work, memory)


def constants(setting: Setting) -> Draft:
    """What stays the same while training: the pass up to the start layer, and what is compared with from above it.

    Kept, in a file past 1 GB: states of every token (T * H * b) and, for the share of tokens that a target of the
    start layer sees, what flowed in, attention, shared experts and frozen experts said (4 * H * b); with a trained
    router for every token of the examples what each of its experts said ((2 + K) * H * b). Of objectives that compare
    with the model before training, its last states at label positions (P * H * b).
    """
    shape, everything = setting.shape, setting.everything
    work = Work()
    if setting.residency != "whole":
        work.read = shape.layer_bytes(range(setting.start + 1))
        work.first = shape.layers[0].bytes
    if setting.residency == "suffix":
        work.read += shape.layer_bytes(setting.suffix)
        work.first += shape.layer_bytes(setting.suffix)
    times = passes(everything.tokens, costs.TOKENS_PER_PASS)
    work.layers(shape, range(setting.start + 1), everything.tokens, times)
    compared = _compared(setting)
    work.layers(shape, setting.suffix[1:], compared.tokens, passes(compared.tokens, costs.TOKENS_PER_LOOK))
    work.head_flops += compared.labels * shape.head_flops
    if setting.residency == "streamed" and compared.tokens:
        work.read += shape.layer_bytes(setting.suffix[1:])
    memory = setting.base_memory(training=True) | {
        "constants": _constants_bytes(setting),
        "states": costs.in_memory(costs.states_bytes(shape, everything.tokens)),
        "activations": costs.forward_bytes(shape, min(everything.tokens, costs.TOKENS_PER_PASS)),
    }
    return Draft("constants", work, memory)


def _compared(setting: Setting) -> TokenCounts:
    """The sequences that the model before training is asked about: for the losses, and the selection probes."""
    method, tokens, found = setting.method, setting.tokens, setting.tokens.selection
    if method.objective in ("npo", "dpo", "undial"):
        found += tokens.forget
    if method.objective == "dpo":
        found += tokens.alternatives
    if method.retain_loss == "kl":
        found += tokens.retain
    return found


def _constants_bytes(setting: Setting) -> int:
    if not setting.targets.layers:
        return 0
    shape, everything = setting.shape, setting.everything
    beside = 4 * int(setting.seen * everything.tokens)
    if setting.method.trains_router:
        trained_on = everything.tokens - setting.tokens.selection.tokens
        beside = (2 + shape.num_experts_per_tok) * trained_on
    size = costs.states_bytes(shape, everything.tokens + beside + _compared(setting).labels)
    return min(size, costs.CONSTANTS_IN_MEMORY)


def unlearning(setting: Setting) -> Draft:
    """Steps from the start layer on, and looks at the selection part.

    Memory: held layers + constants + trained numbers + activations. These are what the layers of a step keep of the
    micro-batch, or, streamed, of one layer and the states between all; then the head's chunk.
    """
    shape, method = setting.shape, setting.method
    work, layers, batch = Work(), setting.steps_layers, setting.batch
    pieces = passes(batch.tokens, setting.micro)
    recomputed = pieces > 1 or setting.residency == "streamed"
    # The start layer runs on what its targets can change, and what else it says is looked up.
    above = layers[1:] if setting.targets.layers else layers
    work.both_ways(shape, above, batch.tokens, pieces, method.steps)
    work.starts = method.steps if setting.targets.layers else 0
    work.backward_flops += 3 * 2 * work.starts * int(setting.seen * batch.tokens) * shape.expert
    if setting.method.trains_router and work.starts:
        # What is kept of frozen experts is kept when it is first asked for.
        work.layers(shape, layers[:1], method.steps * batch.tokens, method.steps)
    if recomputed:
        work.layers(shape, above, method.steps * batch.tokens, method.steps * pieces)
    looks = -(-method.steps // method.evaluate_every) + 1
    selection = setting.tokens.selection
    work.layers(
        shape,
        setting.suffix,
        looks * selection.tokens,
        looks * passes(selection.tokens, costs.TOKENS_PER_LOOK),
    )
    work.head_flops += looks * selection.labels * shape.head_flops
    if method.objective not in HIDDEN_STATE_OBJECTIVES:
        work.head_flops += 2 * method.steps * batch.labels * shape.head_flops
    work.moved = method.steps * setting.trained
    work.written = looks * 16 * setting.trained
    if not setting.targets.layers:  # nothing was loaded before
        work.read += shape.bytes
        work.first += shape.bytes
    if setting.residency == "streamed":
        again = [layer for layer in layers if layer not in setting.targets.layers]
        others = [layer for layer in setting.suffix if layer not in setting.targets.layers]
        work.read += method.steps * 2 * shape.layer_bytes(again) + looks * shape.layer_bytes(others)
    memory = setting.base_memory(training=True) | {
        "constants": _constants_bytes(setting),
        "trained": _trained_bytes(setting),
        "activations": max(
            _step_bytes(setting), costs.forward_bytes(shape, min(selection.tokens, costs.TOKENS_PER_LOOK))
        ),
        "head": costs.head_bytes(shape, max(batch.labels, selection.labels)),
    }
    return Draft("unlearning", work, memory)


def _trained_bytes(setting: Setting) -> int:
    """Of a whole model the value itself is among the layers already."""
    if setting.method.scope == "full":
        return costs.trained_bytes(setting.trained, setting.shape.number) - setting.shape.bytes
    return costs.trained_bytes(setting.trained)


def _step_bytes(setting: Setting) -> int:
    """Activations of one micro-batch, forward and backward, and what the heap holds of them (STEP_SLACK)."""
    shape, tokens = setting.shape, min(setting.micro, setting.batch.tokens)
    layers = setting.steps_layers
    if setting.targets.layers and setting.method.router == "freeze":
        # The start layer runs on the tokens that a target sees, as one of `seen` layers.
        kept = (len(layers) - 1) * costs.kept_bytes(shape, tokens)
        kept += costs.kept_bytes(shape, int(setting.seen * tokens))
    else:
        kept = len(layers) * costs.kept_bytes(shape, tokens)
    if setting.residency == "streamed":
        kept = costs.kept_bytes(shape, tokens) + costs.states_bytes(shape, len(layers) * tokens)
    return int(costs.STEP_SLACK * (kept + costs.forward_bytes(shape, tokens)))


def evaluating(setting: Setting) -> Draft:
    """The test part, before and after, with and without the targets masked: once up to the start layer, and from there
    on each time."""
    shape, test = setting.shape, setting.tokens.test
    stages = MASKED_STAGES if setting.targets.layers else STAGES
    times = passes(test.tokens, costs.TOKENS_PER_LOOK)
    work = Work()
    below = range(setting.start)
    work.layers(shape, below, test.tokens, passes(test.tokens, costs.TOKENS_PER_PASS))
    work.layers(shape, setting.suffix, stages * test.tokens, stages * times)
    work.head_flops += stages * test.labels * shape.head_flops
    if setting.residency != "whole":
        work.read += shape.layer_bytes(below)
    if setting.residency == "streamed":
        others = [layer for layer in setting.suffix if layer not in setting.targets.layers]
        work.read += stages * shape.layer_bytes(others)
    memory = setting.base_memory(training=True) | {
        "constants": _constants_bytes(setting),
        "trained": _trained_bytes(setting) * 5 // 12,
        "states": costs.in_memory(costs.states_bytes(shape, test.tokens)),
        "activations": costs.forward_bytes(shape, min(test.tokens, costs.TOKENS_PER_LOOK)),
        "head": costs.head_bytes(shape, test.labels),
    }
    return Draft("evaluating", work, memory)


def publishing(setting: Setting) -> Draft:
    """Dirty shards copied, patched and read back; clean ones linked; and the delta file."""
    shape, method = setting.shape, setting.method
    changed = setting.trained * shape.number
    if method.scope in ("full", "lora"):
        dirty = set(shape.shards)
        changed = shape.bytes if method.scope == "full" else changed
    else:
        dirty = {shard for layer in setting.targets.layers for shard in shape.layers[layer].shards}
    size = sum(shape.shards[name] for name in dirty)
    work = Work(read=2 * size, first=2 * size, written=size + changed)
    memory = setting.base_memory(training=True) | {
        "constants": _constants_bytes(setting),
        "trained": _trained_bytes(setting) * 5 // 12,
    }
    return Draft("publishing", work, memory)
