"""What differs between Mixture-of-Experts families, as rows of data (torch-free).

One row a family: what the router and the experts of a layer are called on disk, and how the router scores.
What the loaded model or its files say by themselves is in no row: which layers are sparse (those with a router on
disk), the counts (config.json), biases in memory, a transposed or interleaved layout. A Mixture-of-Experts
model whose type has no row is an error that lists the rows; a model without experts needs none.
Names and rules were read from transformers 5.23 and from what its `save_pretrained` writes;
tests/families hold every row against the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from seuf_core.errors import ModelError

LAYER_PREFIX: Final = "model.layers.{layer}."  # of every tensor of a decoder layer, on disk and in memory

Score = Literal["softmax", "sigmoid"]

# config.json names of E and of K, first present wins: transformers 5 renames some of them on saving.
_NUM_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUM_EXPERTS_PER_TOK: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


class ExpertNames(NamedTuple):
    """Names on disk of one expert's three projections: gate [I, H], up [I, H], down [H, I]."""

    gate: str
    up: str
    down: str


_PROJ: Final = ExpertNames("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_W: Final = ExpertNames("w1.weight", "w3.weight", "w2.weight")  # as Mixtral has them


@dataclass(frozen=True, slots=True)
class Family:
    """One row. Shapes: E experts, H hidden size, I expert intermediate size.

    Attributes:
        model_type: as in config.json.
        released: public models of the family, for the reader of the table.
        block: name on disk of the sparse block inside its decoder layer.
        router: name on disk, inside the block, of the router weight [E, H]; router_bias: of its bias [E].
        expert: names on disk of one expert's own tensors, in `experts.{expert}.` inside the block.
        fused: where the experts of a layer share tensors on disk: name in memory, name on disk inside the
            block. `expert` then says nothing.
        score: the router's own score before top-K, or the config.json key that says which it is.
        carries: name of the argument in which each decoder layer gets what the one before returned beside its
            states.
    """

    model_type: str
    released: str
    block: str = "mlp"
    router: str = "gate.weight"
    router_bias: str | None = None
    expert: ExpertNames = _PROJ
    fused: tuple[tuple[str, str], ...] = ()
    score: Literal["softmax", "sigmoid", "expert_selection_fn"] = "softmax"
    carries: str | None = None

    def expert_names(self, layer: int, expert: int) -> dict[str, tuple[str, ...]]:
        """Name in memory of each of one expert's tensors -> its names on disk.

        `gate_up_proj` is two tensors on disk, gate above up, or row `expert` of a fused one, written
        `name[expert]` (seuf_core.checkpoint.index.CheckpointIndex.record).
        """
        if self.fused:
            return {name: (f"{self._in_block(disk, layer)}[{expert}]",) for name, disk in self.fused}
        stem = self._in_block(f"experts.{expert}.", layer)
        return {
            "gate_up_proj": (stem + self.expert.gate, stem + self.expert.up),
            "down_proj": (stem + self.expert.down,),
        }

    def router_names(self, layer: int) -> dict[str, str]:
        """`weight` and, where the family has it, `bias` of a layer's router -> name on disk."""
        names = {"weight": self._in_block(self.router, layer)}
        if self.router_bias is not None:
            names["bias"] = self._in_block(self.router_bias, layer)
        return names

    def layer_names(self, layer: int, num_experts: int) -> list[str]:
        """Every name on disk of a sparse layer's router and its first `num_experts` experts."""
        names = list(self.router_names(layer).values())
        for expert in range(num_experts):
            names += [name for parts in self.expert_names(layer, expert).values() for name in parts]
        return names

    def moe_layers(self, on_disk: Callable[[str], bool], config: Mapping[str, Any]) -> tuple[int, ...]:
        """The decoder layers that have experts, ascending: those whose router is on disk.

        Layers past num_hidden_layers (multi-token prediction) are not the language model's.

        Raises:
            ModelError: incomplete_config.
        """
        return tuple(
            layer for layer in range(num_layers(config)) if on_disk(self.router_names(layer)["weight"])
        )

    def score_function(self, config: Mapping[str, Any]) -> Score:
        """Softmax or sigmoid. Raises ModelError(incomplete_config)."""
        score = config.get(self.score) if self.score == "expert_selection_fn" else self.score
        if score == "softmax" or score == "sigmoid":
            return score
        raise _incomplete(self.score, "softmax or sigmoid")

    def _in_block(self, name: str, layer: int) -> str:
        return f"{LAYER_PREFIX.format(layer=layer)}{self.block}.{name}"


def num_layers(config: Mapping[str, Any]) -> int:
    """Decoder layers, sparse and dense. Raises ModelError(incomplete_config)."""
    return _count(config, ("num_hidden_layers",))


def num_experts(config: Mapping[str, Any]) -> int:
    """E, routed experts a layer. Raises ModelError(incomplete_config)."""
    return _count(config, _NUM_EXPERTS)


def num_experts_per_tok(config: Mapping[str, Any]) -> int:
    """K, experts a token is routed to. Raises ModelError(incomplete_config)."""
    return _count(config, _NUM_EXPERTS_PER_TOK)


def _count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]  # Hunyuan gives one number a layer
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _incomplete(key, "a whole number of at least 1, the same for every layer,")
    return value


def _incomplete(key: str, kind: str) -> ModelError:
    return ModelError(
        "incomplete_config",
        f"config.json needs {kind} under {key!r}.",
        "Restore the config.json that the model was published with.",
    )


def _granite(model_type: str, released: str) -> Family:
    """A row of the Granite families: fused on disk, under names of its own."""
    return Family(
        model_type,
        released,
        block="block_sparse_moe",
        router="router.layer.weight",
        fused=(("gate_up_proj", "input_linear.weight"), ("down_proj", "output_linear.weight")),
    )


_GPT_OSS_TENSORS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

FAMILIES: Final[dict[str, Family]] = {
    family.model_type: family
    for family in (
        Family("afmoe", "Trinity-Mini", router="router.gate.weight", score="sigmoid"),
        Family("axk1", "A.X-K1", score="sigmoid"),
        Family("bailing_hybrid", "Ling-3.0-Flash", score="sigmoid"),
        Family("beam", "Beam-1.0-501B-A23B", score="sigmoid"),
        Family("cohere2_moe", "command-a-plus-05-2026", score="expert_selection_fn"),
        # The files carry norm_topk_prob, but transformers' DeepSeek-V2 never renormalises; it scales the gates by
        # routed_scaling_factor. With group_limited_greedy the router scores other groups 0 after the softmax.
        Family("deepseek_v2", "DeepSeek-V2-Lite, DeepSeek-V2"),
        Family("deepseek_v3", "DeepSeek-V3, DeepSeek-R1", score="sigmoid"),
        Family("deepseek_v32", "DeepSeek-V3.2-Exp", score="sigmoid"),
        Family("dots1", "dots.llm1", score="sigmoid"),
        Family("ernie4_5_moe", "ERNIE-4.5-21B-A3B"),
        Family("exaone_moe", "K-EXAONE-236B-A23B", score="sigmoid"),
        Family("flex_olmo", "FlexOlmo-7x7B-1T"),
        Family("flint", "flint", score="sigmoid"),
        Family("glm4_moe", "GLM-4.5, GLM-4.5-Air", score="sigmoid"),
        Family("glm4_moe_lite", "GLM-4.7-Flash", score="sigmoid"),
        Family("glm_moe_dsa", "GLM-5", score="sigmoid", carries="prev_topk_indices"),
        # Published in MXFP4, which is refused: it is the 16 bit form that has these names.
        Family(
            "gpt_oss",
            "gpt-oss-20b, gpt-oss-120b",
            router="router.weight",
            router_bias="router.bias",
            fused=tuple((name, f"experts.{name}") for name in _GPT_OSS_TENSORS),
        ),
        _granite("granitemoe", "granite-3.0-1b-a400m, granite-3.1-3b-a800m"),
        Family(
            "granitemoe_swa",
            "granite-swash-3b-a600m",
            block="block_sparse_moe",
            router="router.weight",
            fused=tuple((name, f"experts.{name}") for name in ("gate_up_proj", "down_proj")),
        ),
        _granite("granitemoehybrid", "granite-4.0-h-tiny, granite-4.0-h-small"),
        _granite("granitemoeshared", "moe-7b-1b-active-shared-experts"),
        Family("hunyuan_v1_moe", "Hunyuan-A13B", router="gate.wg.weight"),
        Family("hy_v3", "Hy3-preview", router="router.gate.weight", score="sigmoid"),
        Family("jamba", "Jamba-v0.1, AI21-Jamba-Mini", block="feed_forward", router="router.weight"),
        Family("kimi_linear", "Kimi-Linear-48B-A3B", block="block_sparse_moe", expert=_W, score="sigmoid"),
        Family("kolibri1", "Kolibri-1", score="sigmoid"),
        Family("lfm2_moe", "LFM2-8B-A1B", block="feed_forward", expert=_W, score="sigmoid"),
        Family("mellum", "Mellum2-12B-A2.5B"),
        Family("mimo_v2_flash", "MiMo-V2-Flash", score="sigmoid"),
        Family("minimax", "MiniMax-Text-01", block="block_sparse_moe", expert=_W),
        Family("minimax_m2", "MiniMax-M2", block="block_sparse_moe", expert=_W, score="sigmoid"),
        Family("mixtral", "Mixtral-8x7B, Mixtral-8x22B", block="block_sparse_moe", expert=_W),
        Family("olmoe", "OLMoE-1B-7B"),
        # Two softmaxes over thresholded logits weigh its two experts; the score is the softmax over all.
        Family("phimoe", "Phi-3.5-MoE", block="block_sparse_moe", expert=_W),
        Family("qwen2_moe", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
        Family("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B"),
        Family("qwen3_next", "Qwen3-Next-80B-A3B"),
        Family("solar_open", "Solar-Open-100B", score="sigmoid"),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        ModelError: unknown_architecture, listing the known ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            "unknown_architecture",
            f"Model type {model_type!r} has experts and is not supported.",
            f"Use one of: {', '.join(sorted(FAMILIES))}; or a model without experts, with scope lora or full.",
        )
    return family


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of whatever model type, speaks of experts (one is none: Jamba's dense models say 1)."""
    return any(config.get(key) not in (None, 0, 1) for key in _NUM_EXPERTS)


def require_experts(model_type: str, moe_layers: Sequence[int]) -> None:
    """Refuse a model without experts, where a scope chooses among them.

    Raises:
        ModelError: dense_model.
    """
    if not moe_layers:
        raise ModelError(
            "dense_model",
            f"This {model_type} model has no experts to choose from.",
            "Use scope lora or full, or a Mixture-of-Experts model.",
            "/method/scope",
        )
