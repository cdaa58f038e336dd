"""What differs between Mixture-of-Experts families, as rows of data (torch-free).

One row a family: where config.json keeps the expert counts, what the experts and the router are called on
disk and in memory, how the router scores. A model type without a row is an error that lists the rows.
Names and rules were read from transformers 5.23 and from what its `save_pretrained` writes;
tests/test_families.py holds them against the real thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from seuf_core.errors import ModelError

# Names in memory, the same in all five rows: transformers 5 fuses the experts of a layer while loading.
GATE_UP_PROJ = "model.layers.{layer}.mlp.experts.gate_up_proj"  # [E, 2I, H]: rows 0..I gate, I..2I up
DOWN_PROJ = "model.layers.{layer}.mlp.experts.down_proj"  # [E, H, I]
ROUTER = "model.layers.{layer}.mlp.gate.weight"  # [E, H]

LAYER_PREFIX = "model.layers.{layer}."  # of every tensor of a decoder layer, on disk and in memory


class ExpertNames(NamedTuple):
    """Names on disk of one expert's three projections: gate [I, H], up [I, H], down [H, I]."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
        model_type: as in config.json.
        num_experts_keys: config.json names of E, first present wins (transformers 5 renames some on saving).
        gate_proj, up_proj, down_proj: names on disk, with {layer} and {expert}.
        router: name on disk of the router weight [E, H], with {layer}.
        score: the router's own score before top-K.
        renormalised: whether the K gates are divided by their sum: always, never, or as config says.
        layers: which layers have experts: "all", those past `first_k_dense_replace`, or every
            `decoder_sparse_step`-th that is not in `mlp_only_layers`.
    """

    model_type: str
    num_experts_keys: tuple[str, ...]
    gate_proj: str
    up_proj: str
    down_proj: str
    router: str
    renormalised: Literal["always", "never", "norm_topk_prob"]
    layers: Literal["all", "first_k_dense_replace", "decoder_sparse_step"]
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_experts_per_tok_key: str = "num_experts_per_tok"

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """E, routed experts a layer. Raises ModelError(incomplete_config)."""
        for key in self.num_experts_keys:
            if config.get(key) is not None:
                return _count(config, key)
        raise _incomplete(self.num_experts_keys[0])

    def num_experts_per_tok(self, config: Mapping[str, Any]) -> int:
        """K, experts a token is routed to. Raises ModelError(incomplete_config)."""
        return _count(config, self.num_experts_per_tok_key)

    def renormalises(self, config: Mapping[str, Any]) -> bool:
        """Whether the gates of a token's K experts are made to sum to 1."""
        if self.renormalised == "norm_topk_prob":
            return bool(config.get("norm_topk_prob", False))
        return self.renormalised == "always"

    def moe_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The decoder layers that have experts, ascending. Raises ModelError(incomplete_config)."""
        everything = range(_count(config, "num_hidden_layers"))
        if self.layers == "first_k_dense_replace":
            dense = _count(config, "first_k_dense_replace") if config.get("first_k_dense_replace") else 0
            return tuple(layer for layer in everything if layer >= dense)
        if self.layers == "decoder_sparse_step":
            step = _count(config, "decoder_sparse_step") if config.get("decoder_sparse_step") else 1
            dense_layers = config.get("mlp_only_layers") or []
            if not isinstance(dense_layers, list):
                raise _incomplete("mlp_only_layers", "a list")
            return tuple(i for i in everything if i not in dense_layers and (i + 1) % step == 0)
        return tuple(everything)

    def expert_names(self, layer: int, expert: int) -> ExpertNames:
        """Names on disk of one expert's projections."""
        return ExpertNames(
            self.gate_proj.format(layer=layer, expert=expert),
            self.up_proj.format(layer=layer, expert=expert),
            self.down_proj.format(layer=layer, expert=expert),
        )

    def router_name(self, layer: int) -> str:
        """Name on disk of a layer's router weight [E, H]."""
        return self.router.format(layer=layer)


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _incomplete(key)
    return value


def _incomplete(key: str, kind: str = "a whole number of at least 1") -> ModelError:
    return ModelError(
        "incomplete_config",
        f"config.json needs {kind} under {key!r}.",
        "Restore the config.json that the model was published with.",
    )


_MLP = "model.layers.{layer}.mlp."
_SPARSE = "model.layers.{layer}.block_sparse_moe."


def _per_expert(
    model_type: str,
    num_experts_keys: tuple[str, ...],
    renormalised: Literal["always", "never", "norm_topk_prob"],
    layers: Literal["all", "first_k_dense_replace", "decoder_sparse_step"],
) -> Family:
    """A row with the names most families share on disk."""
    expert = _MLP + "experts.{expert}."
    return Family(
        model_type,
        num_experts_keys,
        gate_proj=expert + "gate_proj.weight",
        up_proj=expert + "up_proj.weight",
        down_proj=expert + "down_proj.weight",
        router=_MLP + "gate.weight",
        renormalised=renormalised,
        layers=layers,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        # The released files carry norm_topk_prob, but transformers' DeepSeek-V2 never renormalises; it scales
        # the gates by routed_scaling_factor. With group_limited_greedy the score of other groups is zero.
        _per_expert("deepseek_v2", ("n_routed_experts",), "never", "first_k_dense_replace"),
        Family(
            "mixtral",
            ("num_local_experts",),
            gate_proj=_SPARSE + "experts.{expert}.w1.weight",
            up_proj=_SPARSE + "experts.{expert}.w3.weight",
            down_proj=_SPARSE + "experts.{expert}.w2.weight",
            router=_SPARSE + "gate.weight",
            renormalised="always",
            layers="all",
        ),
        _per_expert("olmoe", ("num_experts",), "norm_topk_prob", "all"),
        _per_expert("qwen2_moe", ("num_experts",), "norm_topk_prob", "decoder_sparse_step"),
        # Published as num_experts; transformers 5 saves it as num_local_experts.
        _per_expert(
            "qwen3_moe", ("num_local_experts", "num_experts"), "norm_topk_prob", "decoder_sparse_step"
        ),
    )
}

# Any of these in a config.json means a Mixture-of-Experts model, known to us or not.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        ModelError: unknown_architecture, listing the known ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            "unknown_architecture",
            f"Model type {model_type!r} is not supported.",
            f"Use one of: {', '.join(sorted(FAMILIES))}.",
        )
    return family


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of whatever model type, speaks of experts."""
    return any(config.get(key) for key in _EXPERT_KEYS)
