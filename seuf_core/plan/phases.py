"""What each phase of a job holds, reads and computes, for one residency of the weights. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from seuf_core.method import HIDDEN_STATE_OBJECTIVES
from seuf_core.plan import costs
from seuf_core.plan.costs import Work, passes
from seuf_core.plan.facts import TokenCounts
from seuf_core.plan.setting import Setting

# Parts of memory that stay on the host when the model is on an accelerator.
ON_HOST: Final = frozenset({"process", "constants"})
# Phases that every further learning rate repeats.
REPEATED: Final = frozenset({"unlearning"})
# Passes over the test part: before and after, each with and without the targets masked.
STAGES, MASKED_STAGES = 2, 4


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
    + one pass's activations. What flows into each layer is left in a file for the constants (L * T * H * b).

    The score `gradient` goes forward once more and back: of one batch what a layer keeps, of all what flows into every
    layer (L * T * H * b; files past 256 MB).
    """
    shape, method, sets = setting.shape, setting.method, setting.attributed
    halves = [-(-one.tokens // 2) for one in sets for _ in range(2)]
    layers, read = range(len(shape.layers)), sum(one.tokens for one in sets)
    size = shape.layer_bytes(layers)
    whole = setting.residency == "whole"
    work = Work(read=size, stored=size, first=size if whole else shape.layers[0].bytes)
    work.written = min((len(layers) - 1) * costs.states_bytes(shape, read), costs.TRAIL_BYTES)
    work.layers(shape, layers, read, sum(passes(half, costs.TOKENS_PER_SCORE) for half in halves))
    memory = setting.base_memory(training=False) | {
        "states": costs.in_memory(costs.states_bytes(shape, read)),
        "activations": costs.forward_bytes(shape, min(max(halves), costs.TOKENS_PER_SCORE)),
        "statistics": 2 * sum(one.labels for one in sets) * len(shape.moe_layers) * shape.num_experts_per_tok,
    }
    if method.attribution == "gradient":
        memory |= _differentiating(setting, work, memory)
    return Draft("attributing", work, memory)


def _differentiating(setting: Setting, work: Work, before: dict[str, int]) -> dict[str, int]:
    """Adds the work of the score `gradient`; what of its memory is more than that of the pass `before` it."""
    shape, forget = setting.shape, setting.tokens.forget
    layers, batch = range(len(shape.layers)), min(-(-forget.tokens // 2), costs.TOKENS_PER_BACKWARD)
    times = 2 * passes(-(-forget.tokens // 2), costs.TOKENS_PER_BACKWARD)
    work.layers(shape, layers, forget.tokens, times)
    work.both_ways(shape, layers, forget.tokens, times, 1)
    work.head_flops += 2 * forget.labels * shape.head_flops
    if setting.residency != "whole":
        _read_again(setting, work, 2 * shape.layer_bytes(layers))
    own = {
        "states": costs.in_memory((len(layers) + 1) * costs.states_bytes(shape, forget.tokens)),
        "activations": costs.kept_bytes(shape, batch)
        + costs.forward_bytes(shape, batch)
        + costs.scaled_bytes(shape, batch),
    }
    most = {name: max(size, before[name]) for name, size in own.items()}
    labels = -(-forget.labels * batch // max(1, forget.tokens))
    return most | {"head": costs.head_bytes(shape, labels)}


def constants(setting: Setting) -> Draft:
    """What stays the same while training: the pass up to the start layer, and what is compared with from above it.

    What attribution has read goes on from where its states end (`Setting.trail`). Kept, in a file past 1 GB: see
    `_constants_bytes`.
    """
    shape, everything = setting.shape, setting.everything
    work = Work()
    if setting.residency != "whole":
        held = setting.suffix if setting.residency == "suffix" else setting.targets.layers
        _read_again(setting, work, shape.layer_bytes(held), behind_nothing=True)
        _read_again(setting, work, shape.layer_bytes(range(setting.start)))
    known = sum(one.tokens for one in setting.attributed)
    anew = everything.tokens - known
    work.layers(shape, range(setting.start + 1), anew, passes(anew, costs.TOKENS_PER_PASS))
    work.layers(shape, range(setting.trail, setting.start + 1), known, passes(known, costs.TOKENS_PER_PASS))
    _ask_base(setting, work, setting.suffix[1:])
    memory = setting.base_memory(training=True, below=True) | {
        "constants": _constants_bytes(setting),
        "states": costs.in_memory(costs.states_bytes(shape, everything.tokens)),
        "activations": costs.forward_bytes(shape, min(everything.tokens, costs.TOKENS_PER_PASS)),
    }
    return Draft("constants", work, memory)


def _ask_base(setting: Setting, work: Work, layers: range) -> None:
    """Adds what the model before training is asked: what losses compare with, a step's batch at a time, and a look."""
    shape, compared, selection = setting.shape, _compared(setting), setting.tokens.selection
    calls = passes(compared.sequences, setting.method.batch_size)
    calls += passes(selection.tokens, costs.TOKENS_PER_LOOK)
    asked = compared + selection
    work.layers(shape, layers, asked.tokens, calls, asked.labels)
    work.head_flops += asked.labels * shape.head_flops
    if setting.residency == "streamed":
        others = [layer for layer in layers if layer not in setting.targets.layers]
        _read_again(setting, work, calls * shape.layer_bytes(others))


def _read_again(setting: Setting, work: Work, size: int, *, behind_nothing: bool = False) -> None:
    """Adds the loading of layers that attribution has read before."""
    stored = 0 if setting.cached else size
    work.read += size
    work.stored += stored
    work.first += stored if behind_nothing else 0


def _compared(setting: Setting) -> TokenCounts:
    """The sequences that losses ask the model before training about."""
    method, tokens, found = setting.method, setting.tokens, TokenCounts()
    if method.objective in ("npo", "dpo", "undial"):
        found += tokens.forget
    if method.objective == "dpo":
        found += tokens.alternatives
    if method.retain_loss == "kl" or method.objective == "pdu":
        found += tokens.retain
    return found


def _constants_bytes(setting: Setting) -> int:
    """States of every token (T * H * b) and, for the share of tokens that a target of the start layer sees, what flowed
    in, attention, shared experts and frozen experts said (4 * H * b); with a trained router, for every token of the
    examples what each of its experts said ((2 + K) * H * b). And `_reference_bytes`."""
    shape, everything = setting.shape, setting.everything
    if not setting.targets.layers:
        return _reference_bytes(setting)
    beside = 4 * int(setting.seen * everything.tokens)
    if setting.method.trains_router:
        trained_on = everything.tokens - setting.tokens.selection.tokens
        beside = (2 + shape.num_experts_per_tok) * trained_on
    size = min(costs.states_bytes(shape, everything.tokens + beside), costs.CONSTANTS_IN_MEMORY)
    return size + _reference_bytes(setting)


def _reference_bytes(setting: Setting) -> int:
    """What losses compare with: states at label positions (P * H * b). Likelihoods count for nothing."""
    method, tokens = setting.method, setting.tokens
    labels = tokens.forget.labels if method.objective == "undial" else 0
    if method.retain_loss in ("kl", "hidden_mse"):
        labels += tokens.retain.labels
    return costs.states_bytes(setting.shape, labels)


def unlearning(setting: Setting) -> Draft:
    """Steps from the start layer on, and looks at the selection part.

    Memory: held layers + constants + trained numbers + activations: the larger of a step's and a look's; then the
    head's chunk.
    """
    shape, selection = setting.shape, setting.tokens.selection
    work = Work()
    _steps(setting, work)
    _looks(setting, work)
    work.written = looks_of(setting) * 16 * setting.trained
    if not setting.targets.layers:  # nothing was loaded or asked before
        size = shape.layer_bytes(range(len(shape.layers)))
        work.read, work.stored, work.first = size, size, size
        _ask_base(setting, work, setting.suffix)
    look = costs.forward_bytes(shape, min(selection.tokens, costs.TOKENS_PER_LOOK))
    look += costs.states_bytes(shape, min(selection.tokens, costs.TOKENS_OF_A_LOOK))
    memory = setting.base_memory(training=True) | {
        "constants": _constants_bytes(setting),
        "trained": _trained_bytes(setting),
        "activations": max(_step_bytes(setting), look),
        "head": costs.head_bytes(shape, max(setting.batch.labels, selection.labels)),
    }
    if setting.method.scope == "full":  # the head is trained too, and its graph kept
        memory["head"] = costs.logits_bytes(shape, setting.batch.labels)
    return Draft("unlearning", work, memory)


def _steps(setting: Setting, work: Work) -> None:
    """Adds what the steps compute and read."""
    shape, method, layers, batch = setting.shape, setting.method, setting.steps_layers, setting.batch
    labels = setting.at_labels(setting.top, batch.labels)
    # The start layer runs on what its targets can change, and what else it says is looked up.
    above = layers[1:] if setting.targets.layers else layers
    work.both_ways(shape, above, batch.tokens, setting.pieces, method.steps, labels)
    work.starts = method.steps if setting.targets.layers else 0
    work.backward_flops += 3 * 2 * work.starts * int(setting.seen * batch.tokens) * shape.expert
    if method.trains_router and work.starts:
        # What is kept of frozen experts is kept when it is first asked for.
        work.layers(shape, layers[:1], method.steps * batch.tokens, method.steps)
    if setting.recomputed:
        work.calls += method.steps * setting.pieces * len(above)
        work.flops += method.steps * costs.operations(shape, above, batch.tokens, labels)
    if method.objective not in HIDDEN_STATE_OBJECTIVES:
        work.head_flops += 2 * method.steps * batch.labels * shape.head_flops
    if method.scope == "full":  # every weight wants a gradient: one product more, as large as the one forward
        work.backward_flops += method.steps * costs.operations(shape, above, batch.tokens, labels)
        work.head_flops += method.steps * batch.labels * shape.head_flops
    work.moved = method.steps * setting.trained
    if setting.residency == "streamed":
        again = [layer for layer in layers if layer not in setting.targets.layers]
        _read_again(setting, work, method.steps * 2 * shape.layer_bytes(again))


def looks_of(setting: Setting) -> int:
    """How often the selection part is looked at while training."""
    return -(-setting.method.steps // setting.method.evaluate_every)


def _looks(setting: Setting, work: Work) -> None:
    """Adds what they compute and read: everything from the start layer on, of which that one is mostly looked up."""
    shape, selection, times = setting.shape, setting.tokens.selection, looks_of(setting)
    looked_up = bool(setting.targets.layers) and not setting.method.trains_router
    layers = setting.suffix[1:] if looked_up else setting.suffix
    calls = times * passes(selection.tokens, costs.TOKENS_PER_LOOK)
    work.layers(shape, layers, times * selection.tokens, calls, times * selection.labels)
    work.head_flops += times * selection.labels * shape.head_flops
    if setting.residency == "streamed":
        others = [layer for layer in setting.suffix if layer not in setting.targets.layers]
        _read_again(setting, work, times * shape.layer_bytes(others))


def _trained_bytes(setting: Setting) -> int:
    """Of a whole model the value itself is among the layers already."""
    if setting.method.scope == "full":
        among = setting.shape.bytes
        return costs.trained_bytes(setting.trained, looks_of(setting), setting.shape.number) - among
    return costs.trained_bytes(setting.trained, looks_of(setting))


def _found_bytes(setting: Setting) -> int:
    """What of it is left when the best step is known; and of adapted matrices what they were."""
    if setting.method.scope == "full":
        return costs.found_bytes(setting.trained, setting.shape.number) - setting.shape.bytes
    adapted = _adapted_bytes(setting) if setting.method.scope == "lora" else 0
    return costs.found_bytes(setting.trained) + adapted


def _adapted_bytes(setting: Setting) -> int:
    """Of the matrices that adapters change: all outside embeddings and experts, routers counted in."""
    return setting.shape.number * sum(layer.dense for layer in setting.shape.layers)


def _step_bytes(setting: Setting) -> int:
    """Activations of one micro-batch, forward and backward, and what the heap holds of them (STEP_SLACK).

    What each layer keeps; or, where a step runs in pieces or streamed, what one layer keeps of a piece, and what flowed
    into each layer of the whole batch.
    """
    shape, batch, layers = setting.shape, setting.batch, setting.steps_layers
    tokens = min(setting.micro, batch.tokens)
    if setting.recomputed:
        kept = costs.kept_bytes(shape, tokens) + costs.states_bytes(shape, len(layers) * batch.tokens)
    else:
        # The start layer runs on the tokens that a target sees, as one of `seen` layers.
        looked_up = bool(setting.targets.layers) and setting.method.router == "freeze"
        kept = costs.kept_bytes(shape, int(setting.seen * tokens) if looked_up else tokens)
        if len(layers) > 1:
            last = setting.at_labels(setting.top, min(batch.labels, tokens))
            kept += (len(layers) - 2) * costs.kept_bytes(shape, tokens)
            kept += costs.kept_bytes(shape, tokens, last)
    if setting.method.scope == "lora":
        kept += (1 if setting.recomputed else len(layers)) * costs.adapted_bytes(shape, tokens)
    return int(costs.STEP_SLACK * (kept + costs.forward_bytes(shape, tokens)))


def evaluating(setting: Setting) -> Draft:
    """The test part, before and after, with and without the targets masked: once up to the start layer, and from there
    on each time.

    Memory: held layers, states of every token while they are made and as they are kept, and one pass's activations.
    """
    shape, test = setting.shape, setting.tokens.test
    stages = MASKED_STAGES if setting.targets.layers else STAGES
    times = passes(test.tokens, costs.TOKENS_PER_LOOK)
    work = Work()
    below = range(setting.start)
    work.layers(shape, below, test.tokens, passes(test.tokens, costs.TOKENS_PER_PASS))
    work.layers(shape, setting.suffix, stages * test.tokens, stages * times, stages * test.labels)
    work.head_flops += stages * test.labels * shape.head_flops
    if setting.residency != "whole":
        _read_again(setting, work, shape.layer_bytes(below))
    if setting.residency == "streamed":
        others = [layer for layer in setting.suffix if layer not in setting.targets.layers]
        _read_again(setting, work, stages * shape.layer_bytes(others))
    states = costs.states_bytes(shape, test.tokens)
    look = costs.states_bytes(shape, min(test.tokens, costs.TOKENS_OF_A_LOOK))
    memory = setting.base_memory(training=True, below=True) | {
        "constants": min(states, costs.CONSTANTS_IN_MEMORY) if setting.targets.layers else 0,
        "trained": _found_bytes(setting),
        "states": max(costs.in_memory(states), look),
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
        changed = shape.bytes if method.scope == "full" else _adapted_bytes(setting)
    else:
        dirty = {shard for layer in setting.targets.layers for shard in shape.layers[layer].shards}
    size = sum(shape.shards[name] for name in dirty)
    work = Work(copied=size, written=changed)
    memory = setting.base_memory(training=True) | {"trained": _found_bytes(setting)}
    return Draft("publishing", work, memory)
