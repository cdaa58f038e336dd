"""What a job is to its plan: the model's shape, tokens, method, what is trained, how weights are kept. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from seuf_core.method import HIDDEN_STATE_OBJECTIVES, Method
from seuf_core.plan.costs import TRAIL_BYTES
from seuf_core.plan.facts import BASELINE_BYTES, Calibration, JobTokens, ModelShape, TokenCounts

Residency = Literal["whole", "suffix", "streamed"]


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
    """One job on one model, and how its weights are kept.

    cached: whether a layer that was read once lies in the page cache when it is read again.
    """

    shape: ModelShape
    tokens: JobTokens
    method: Method
    targets: Targets
    calibration: Calibration | None
    residency: Residency = "whole"
    micro: int = 0
    cached: bool = True

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
    def attributed(self) -> tuple[TokenCounts, ...]:
        """The sets that attribution reads."""
        tokens, method = self.tokens, self.method
        if not method.selects_experts:
            return ()
        return (tokens.forget, tokens.retain) if method.attribution == "contrast" else (tokens.forget,)

    @property
    def trail(self) -> int:
        """The highest layer, up to the start layer, whose input is kept of what attribution reads."""
        each = sum(one.tokens for one in self.attributed) * self.shape.width * self.shape.number
        return min(self.start, TRAIL_BYTES // each) if each else 0

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

    @property
    def pieces(self) -> int:
        """In how many pieces a step runs."""
        return max(1, -(-self.batch.tokens // max(1, self.micro)))

    @property
    def recomputed(self) -> bool:
        """Whether a step keeps what flows into each layer and runs the layer once more on its way back."""
        return self.pieces > 1 or self.residency == "streamed"

    def at_labels(self, layer: int, labels: int) -> int | None:
        """What experts run on in the layer where a step ends: label positions, unless an anchor hears its router."""
        heard = self.method.trains_router and layer in self.targets.layers
        return None if heard else labels

    def layers_held(self, training: bool, below: bool = False) -> int:
        """Bytes of decoder layers in memory: before training all, or one at a time; `below`: while a pass comes from
        the first layer up to the start layer."""
        shape = self.shape
        if self.residency == "whole":
            return shape.layer_bytes(range(len(shape.layers)))
        streamed = shape.largest_layer
        if not training:
            return streamed
        if self.residency == "suffix":
            return shape.layer_bytes(self.suffix) + (streamed if below and self.start else 0)
        return shape.layer_bytes(self.targets.layers) + streamed

    def base_memory(self, training: bool, below: bool = False) -> dict[str, int]:
        """What every phase has: the process, what is outside the layers, and the layers (`layers_held`)."""
        measured = self.calibration.baseline_bytes if self.calibration else BASELINE_BYTES
        return {
            "process": measured,
            "outside": self.shape.outside_bytes,
            "layers": self.layers_held(training, below),
        }
