"""What a plan is made from: the sizes of a checkpoint, token counts of a job's sets, rates and memory of a machine.

Torch-free. Letters: H hidden size, V vocabulary, E routed experts a layer, K experts a token, I expert intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from seuf_core.checkpoint.index import CheckpointIndex, TensorRecord, read_index
from seuf_core.checkpoint.inspect import ModelFacts, inspect_model, read_config
from seuf_core.errors import ModelError
from seuf_core.families import FAMILIES

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer on disk.

    bytes: of all its tensors. dense: elements of its matrices outside the routed experts, router included: each
    token is multiplied with all of them. outputs: how many numbers these give for each token. shards: the files it
    lies in. block: of `dense`, what lies in one module with the experts: router and, mostly, shared experts.
    """

    bytes: int
    dense: int
    outputs: int
    shards: tuple[str, ...]
    block: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A checkpoint in numbers, from its headers and config.json; no weight is read.

    Attributes:
        layers: of each decoder layer; layers past num_hidden_layers (multi-token prediction) are not counted.
        moe_layers: indices of the sparse ones.
        outside_bytes: embeddings, final norm and head, which are in memory from beginning to end.
        expert: elements of one routed expert; router: of one router's weight; adapted: inputs plus outputs of all
            linear layers outside experts, routers and head, which LoRA's adapters have `rank` of.
        width: H; vocabulary: V; intermediate: I, from the expert's own tensors (3 * I * H elements).
        number: bytes of a number of the model: 2 or 4 (the dtype that most of the files have).
        shards: file name -> size in bytes.
        parameters: elements of all tensors.
    """

    layers: tuple[LayerShape, ...]
    moe_layers: tuple[int, ...]
    outside_bytes: int
    expert: int
    router: int
    adapted: int
    width: int
    vocabulary: int
    num_experts: int
    num_experts_per_tok: int
    number: int
    shards: dict[str, int]
    parameters: int

    @property
    def bytes(self) -> int:
        """Of everything that a job may load."""
        return self.outside_bytes + sum(layer.bytes for layer in self.layers)

    @property
    def intermediate(self) -> int:
        """I of the routed experts, from 3 * I * H elements of one."""
        return round(self.expert / (3 * self.width))

    @property
    def outputs(self) -> int:
        """Numbers that the dense matrices of a layer give for each token; of the layer with most."""
        return max(layer.outputs for layer in self.layers)

    def flops(self, layer: int) -> int:
        """Floating-point operations of one token in one decoder layer: 2 for each weight it is multiplied with.

        Attention scores are left out: 4 * H for each earlier token, 2 % of a layer at 256 tokens.
        """
        return 2 * self.layers[layer].dense + self._routed_flops(layer)

    def block_flops(self, layer: int) -> int:
        """Of these, those of the module that has the experts: in a job's last layer it runs at label positions only."""
        return 2 * self.layers[layer].block + self._routed_flops(layer)

    def _routed_flops(self, layer: int) -> int:
        return 2 * self.num_experts_per_tok * self.expert if layer in self.moe_layers else 0

    @property
    def head_flops(self) -> int:
        """Of one position in the output head."""
        return 2 * self.width * self.vocabulary

    def layer_bytes(self, layers: Iterable[int]) -> int:
        """Of several layers together."""
        return sum(self.layers[layer].bytes for layer in layers)

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer."""
        return max(layer.bytes for layer in self.layers)


def model_shape(folder: Path) -> ModelShape:
    """The numbers of a model folder.

    Raises:
        ModelError: as seuf_core.checkpoint.inspect.inspect_model; incomplete_config.
    """
    facts, index, config = inspect_model(folder), read_index(folder), read_config(folder)
    by_layer: list[list[TensorRecord]] = [[] for _ in range(facts.num_layers)]
    outside = 0
    for record in index.tensors.values():
        found = _LAYER.match(record.name)
        if found is None:
            outside += record.bytes
        elif int(found[1]) < facts.num_layers:
            by_layer[int(found[1])].append(record)
    expert = _expert(index, facts)
    layers = tuple(_layer(records, facts, number, expert) for number, records in enumerate(by_layer))
    routers = _router_names(facts)
    adapted = sum(
        sum(record.shape)
        for records in by_layer
        for record in records
        if len(record.shape) == 2 and ".experts." not in record.name and record.name not in routers
    )
    width = _size(config, "hidden_size")
    return ModelShape(
        layers=layers,
        moe_layers=facts.moe_layers,
        outside_bytes=outside,
        expert=expert,
        router=facts.num_experts * width,
        adapted=adapted,
        width=width,
        vocabulary=_size(config, "vocab_size"),
        num_experts=facts.num_experts,
        num_experts_per_tok=facts.num_experts_per_tok,
        number=_BYTES[facts.dtype],
        shards={shard.name: shard.size for shard in index.shards},
        parameters=facts.parameters,
    )


def _layer(records: list[TensorRecord], facts: ModelFacts, number: int, expert: int) -> LayerShape:
    routed, block = 0, ""
    if number in facts.moe_layers:
        routed, block = facts.num_experts * expert, _block(facts, number)
    matrices = [record for record in records if len(record.shape) > 1]
    # Where experts are fused on disk, their tensors have a third axis; where not, "experts." in their names.
    outputs = sum(r.shape[0] for r in matrices if len(r.shape) == 2 and ".experts." not in r.name)
    beside = sum(record.elements for record in matrices if block and record.name.startswith(block)) - routed
    return LayerShape(
        bytes=sum(record.bytes for record in records),
        dense=sum(record.elements for record in matrices) - routed,
        outputs=outputs,
        shards=tuple(sorted({record.shard for record in records})),
        block=max(0, beside),
    )


def _block(facts: ModelFacts, layer: int) -> str:
    """What the names of all tensors beside a layer's experts begin with: `model.layers.3.mlp.`."""
    names = FAMILIES[facts.model_type].expert_names(layer, 0)
    first = next(name for parts in names.values() for name in parts)
    return ".".join(first.split(".")[:4]) + "."


def _expert(index: CheckpointIndex, facts: ModelFacts) -> int:
    """Elements of the matrices of one routed expert; 0 for a dense model."""
    if not facts.moe_layers:
        return 0
    names = FAMILIES[facts.model_type].expert_names(facts.moe_layers[0], 0)
    records = [index.record(name) for parts in names.values() for name in parts]
    return sum(record.elements for record in records if record is not None and len(record.shape) > 1)


def _router_names(facts: ModelFacts) -> set[str]:
    if not facts.moe_layers:
        return set()
    family = FAMILIES[facts.model_type]
    return {name for layer in facts.moe_layers for name in family.router_names(layer).values()}


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            "incomplete_config",
            f"config.json needs a whole number of at least 1 under {key!r}.",
            "Restore the config.json that the model was published with.",
        )
    return value


@dataclass(frozen=True)
class TokenCounts:
    """One set as tokens.

    sequences: how many; tokens: of all of them; labels: those that are predicted; longest: tokens of the longest.
    """

    sequences: int = 0
    tokens: int = 0
    labels: int = 0
    longest: int = 0

    @classmethod
    def of(cls, sequences: Iterable[tuple[int, int]]) -> Self:
        """From (tokens, of these labels) of each sequence."""
        pairs = list(sequences)
        lengths, labels = [length for length, _ in pairs], [labels for _, labels in pairs]
        return cls(len(pairs), sum(lengths), sum(labels), max(lengths, default=0))

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Both sets together."""
        return TokenCounts(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.labels + other.labels,
            max(self.longest, other.longest),
        )

    def batch(self, sequences: int) -> TokenCounts:
        """So many sequences of this set, padded to its longest; labels by their share."""
        if not self.sequences:
            return TokenCounts()
        labels = -(-self.labels * sequences // self.sequences)
        return TokenCounts(sequences, sequences * self.longest, labels, self.longest)


@dataclass(frozen=True)
class JobTokens:
    """The sets of a job: training parts, alternatives (dpo), and the probes of the selection and the test part.

    counted: "tokenizer", or "bytes" where a text's bytes / 4 stand in for its tokens.
    """

    forget: TokenCounts
    retain: TokenCounts
    alternatives: TokenCounts
    selection: TokenCounts
    test: TokenCounts
    counted: str = "tokenizer"


@dataclass(frozen=True)
class Calibration:
    """What a machine does with a model of these shapes, measured in a few seconds (seuf_core.plan.calibrate).

    layer_rate: FLOP/s of a decoder layer's matrices, beyond `layer_seconds`, which each call of a layer costs
        however few tokens go through (its weights pass the processor once). backward_rate, backward_seconds: the
        same of a forward and backward pass together, by activations only. head_rate: FLOP/s of the output head.
    read_rate: bytes/s of layers that are loaded for the first time; reread_rate: of such that lie in the page cache;
        cached: whether they all did. write_rate: bytes/s of a file that is copied, read back and hashed.
    step_rate: elements that the optimiser moves a second. baseline_bytes: anonymous memory of the process without
    the model.
    device: where the rates were measured.
    """

    layer_rate: float
    layer_seconds: float
    backward_rate: float
    backward_seconds: float
    head_rate: float
    step_rate: float
    read_rate: float
    reread_rate: float
    write_rate: float
    cached: bool
    baseline_bytes: int
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Self | None:
        """What `as_dict` gave; None for that of another version, which measured other things."""
        return cls(**found) if found.keys() == {field.name for field in fields(cls)} else None


# Anonymous memory of a process that has imported torch and transformers and loaded nothing, where nobody measured it.
BASELINE_BYTES = 350_000_000


# Of what is free: the rest is for what the kernel and others take meanwhile.
USABLE = 0.9


@dataclass(frozen=True)
class Machine:
    """Where a job would run.

    memory: bytes that the job may have on the host. limit: where that figure comes from, in words.
    devices: name -> bytes that it may have on each accelerator, as whoever has torch passes it in
    (torch.cuda.mem_get_info). cache: bytes of files that may stay in the page cache; None = as many as there are.
    """

    memory: int
    limit: str
    devices: dict[str, int]
    cache: int | None = None
