"""The tiny config of every family: what `tests.tiny` builds. One entry a row of seuf_core.families.

`SHAPE` holds what all have; an entry names the config class and the fields beside it. Small, but with every
peculiarity of the family switched on: dense first layers, groups, a selection bias, layers without attention.
"""

from __future__ import annotations

from typing import Any

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Wider than the usual .02: with a hidden size of 32 a router would otherwise be uniform to three digits, and
# top-k selection would hang on rounding noise.
INITIALIZER_RANGE = 0.2

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MLP = {"intermediate_size": 48, "moe_intermediate_size": 16}  # dense layers and experts
_TOP2 = {"num_experts": 8, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
_GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
_LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LATENT_RANK = {**_LATENT, "q_lora_rank": 16}
_INDEXER = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}  # attention to the best tokens only
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": _HYBRID,
}
_MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_DENSE_FIRST = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
_DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]

# family -> (config class, fields beside SHAPE)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", {**_MLP, **_TOP2, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MLP, **_TOP2, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", {**_TOP2, "intermediate_size": 16}),
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_MLP, **_ROUTED, **_LATENT, **_DENSE_FIRST,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_MLP, **_ROUTED, **_GROUPS, **_LATENT, **_DENSE_FIRST}),
    "gpt_oss": (
        "GptOssConfig",
        {**_LOCAL, "intermediate_size": 16, "head_dim": 8, "sliding_window": 4},
    ),
    "phimoe": (
        "PhimoeConfig",
        {**_LOCAL, "intermediate_size": 16, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1},
    ),
    "granitemoe": ("GraniteMoeConfig", {**_LOCAL, "intermediate_size": 16, "logits_scaling": 2.0}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {**_LOCAL, "intermediate_size": 16, "shared_intermediate_size": 24, "logits_scaling": 2.0},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_LOCAL,
            **_MAMBA,
            "intermediate_size": 16,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_MLP, **_ROUTED, **_GROUPS, **_DENSE_FIRST, "head_dim": 8}),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**_MLP, **_ROUTED, **_GROUPS, **_LATENT, "mlp_layer_types": _DENSE_THEN_SPARSE},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            **_MLP,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {"intermediate_size": 16, "num_experts": 8, "moe_topk": 2, "head_dim": 8},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_MLP, **_TOP2, **_DELTA_NET, "head_dim": 8, "shared_expert_intermediate_size": 24},
    ),
    "jamba": (
        "JambaConfig",
        {
            **_TOP2,
            **_MAMBA,
            "num_hidden_layers": 4,
            "intermediate_size": 16,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "flex_olmo": ("FlexOlmoConfig", {**_TOP2, "intermediate_size": 16, "norm_topk_prob": True}),
    "dots1": ("Dots1Config", {**_MLP, **_ROUTED, **_GROUPS, **_DENSE_FIRST, "head_dim": 8}),
    "minimax": (
        "MiniMaxConfig",
        {
            **_LOCAL,
            "intermediate_size": 16,
            "block_size": 4,
            "layer_types": _HYBRID,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", {**_LOCAL, "intermediate_size": 16, "head_dim": 8}),
    "solar_open": (
        "SolarOpenConfig",
        {**_ROUTED, **_GROUPS, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "mellum": (
        "MellumConfig",
        {**_MLP, **_TOP2, "head_dim": 8, "sliding_window": 4, "mlp_layer_types": _DENSE_THEN_SPARSE},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**_MLP, **_TOP2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "exaone_moe": (
        "ExaoneMoeConfig",
        {**_MLP, **_TOP2, **_GROUPS, "mlp_layer_types": _DENSE_THEN_SPARSE, "num_shared_experts": 1},
    ),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        {
            **_TOP2,
            "intermediate_size": 16,
            "head_dim": 8,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
            "mlp_layer_types": _DENSE_THEN_SPARSE,
        },
    ),
    "afmoe": (
        "AfmoeConfig",
        {**_MLP, **_TOP2, "head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.5},
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {**_MLP, **_ROUTED, **_GROUPS, "head_dim": 8, "v_head_dim": 8, "mlp_layer_types": _DENSE_THEN_SPARSE},
    ),
    "axk1": (
        "AXK1Config",
        {**_MLP, **_ROUTED, **_GROUPS, **_LATENT_RANK, "mlp_layer_types": _DENSE_THEN_SPARSE},
    ),
    "beam": (
        "BeamConfig",
        {
            **_MLP, **_TOP2,
            "n_group": 4, "topk_group": 2, "head_dim": 8, "sliding_window": 4,
            "mlp_layer_types": _DENSE_THEN_SPARSE,
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **_MLP, **_ROUTED, **_GROUPS, **_LATENT_RANK, **_INDEXER,
            "head_dim": 8, "mlp_layer_types": _DENSE_THEN_SPARSE,
        },
    ),
    "flint": (
        "FlintConfig",
        {
            **_MLP, **_TOP2,
            "head_dim": 8, "shared_expert_intermediate_size": 24, "sliding_window": 4, "mlp_only_layers": [1],
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {
            **_MLP, **_ROUTED, **_GROUPS, **_LATENT_RANK, **_INDEXER,
            "head_dim": 8, "mlp_layer_types": _DENSE_THEN_SPARSE,
        },
    ),
    "granitemoe_swa": ("GraniteMoeSWAConfig", {**_LOCAL, "intermediate_size": 16, "sliding_window": 4}),
    "hy_v3": (
        "HYV3Config",
        {**_MLP, **_TOP2, "head_dim": 8, "num_shared_experts": 1, "mlp_layer_types": _DENSE_THEN_SPARSE},
    ),
    "kolibri1": ("Kolibri1Config", {**_MLP, **_TOP2, "head_dim": 8, "shared_expert_intermediate_size": 24}),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {
            **_MLP, **_LOCAL, **_GROUPS, **_LATENT_RANK,
            "head_dim": 8, "first_k_dense_replace": 1, "layer_types": _HYBRID,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_MLP, **_TOP2, **_LATENT,
            "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": _HYBRID,
        },
    ),
    "llama": ("LlamaConfig", {"intermediate_size": 48}),
    "qwen2": ("Qwen2Config", {"intermediate_size": 48}),
}  # fmt: skip
