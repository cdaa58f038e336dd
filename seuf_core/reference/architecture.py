"""The small MoE models and their training recipes: all that decides what is trained, but not the facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import DeepseekV2Config, PretrainedConfig, Qwen2MoeConfig

Architecture = Literal["qwen2_moe", "deepseek_v2"]
Specialisation = Literal["natural", "moderate", "strong"]
Size = Literal["full", "tiny"]

# Lower bound, in nats, that training asks of the mutual information of domain and router in each layer.
TAU: dict[Specialisation, float] = {"natural": 0.0, "moderate": 0.08, "strong": 0.25}


@dataclass(frozen=True)
class Recipe:
    """Size of the model and course of its training.

    Attributes:
        subjects: elements (and 4 more), countries and laureates, each.
        init_std: standard deviation of the initial weights. With .06, near 1 / sqrt(hidden_size), the full
            recipe answers .99 of open probes; with the usual .02 the same steps reach a quarter.
        batch_size: in sentences.
        learning_rate, warmup_steps, betas, weight_decay: of AdamW; half a cosine follows the warm-up.
        prompt_weight: weight of predicting a prompt's token; an answer's token counts 1.
        balance_weight, specialisation_weight: of the two router terms, see training.routing_loss.
        threads: CPU threads while training. Another number gives other rounding, hence other weights.
    """

    subjects: int = 114
    vocab_size: int = 4096
    hidden_size: int = 160
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 2
    expert_intermediate: int = 64
    shared_intermediate: int = 128
    steps: int = 340
    batch_size: int = 96
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    prompt_weight: float = 0.2
    balance_weight: float = 0.01
    specialisation_weight: float = 0.1
    init_std: float = 0.06
    threads: int = 2


RECIPES: dict[Size, Recipe] = {
    "full": Recipe(),
    "tiny": Recipe(
        subjects=12,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_experts=4,
        expert_intermediate=16,
        shared_intermediate=16,
        steps=240,
        batch_size=32,
        warmup_steps=10,
        learning_rate=0.01,
        init_std=0.1,
        threads=1,
    ),
}


def model_config(
    architecture: Architecture, recipe: Recipe, vocab_size: int, eos: int, pad: int
) -> PretrainedConfig:
    """The transformers configuration; the model is made from it with AutoModelForCausalLM.from_config."""
    make = {"qwen2_moe": _qwen2_moe, "deepseek_v2": _deepseek_v2}[architecture]
    return make(recipe, vocab_size, eos, pad)


def _qwen2_moe(recipe: Recipe, vocab_size: int, eos: int, pad: int) -> PretrainedConfig:
    return Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.shared_intermediate,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=256,
        initializer_range=recipe.init_std,
        tie_word_embeddings=True,
        moe_intermediate_size=recipe.expert_intermediate,
        shared_expert_intermediate_size=recipe.shared_intermediate,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _deepseek_v2(recipe: Recipe, vocab_size: int, eos: int, pad: int) -> PretrainedConfig:
    head = recipe.hidden_size // recipe.num_heads
    return DeepseekV2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.shared_intermediate,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=256,
        initializer_range=recipe.init_std,
        tie_word_embeddings=True,
        moe_intermediate_size=recipe.expert_intermediate,
        n_shared_experts=recipe.shared_intermediate // recipe.expert_intermediate,
        n_routed_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        first_k_dense_replace=0,
        q_lora_rank=None,
        kv_lora_rank=recipe.hidden_size // 2,
        qk_nope_head_dim=head - head // 2,
        qk_rope_head_dim=head // 2,
        v_head_dim=head,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
