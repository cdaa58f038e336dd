"""Tiny random models of every supported family, written to a folder the way a real checkpoint is.

`write_model(folder, "qwen2_moe", seed=0)` gives a folder that `from_pretrained` opens: config, safetensors in
two or more shards, and a byte-level tokenizer. Real transformers code, real files, about 150 kB, offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Wider than the usual .02: with a hidden size of 32 a router would otherwise be uniform to three digits, and
# top-k selection would hang on rounding noise.
INITIALIZER_RANGE = 0.2

_SHAPE: dict[str, Any] = {
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

# family -> (config class, fields beside _SHAPE)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "llama": ("LlamaConfig", {"intermediate_size": 48}),
}

MOE_FAMILIES = tuple(family for family in _CONFIGS if family != "llama")


def build_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 CPU model in eval mode; `overrides` are config fields. Same seed, same weights."""
    class_name, fields = _CONFIGS[family]
    config = getattr(transformers, class_name)(**{**_SHAPE, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 3 to 258 in the order of the byte-level alphabet), nothing added by itself."""
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=512
    )


def write_model(
    folder: Path,
    family: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "40KB",
    **overrides: Any,
) -> Path:
    """Write a tiny model of `family` with its tokenizer into `folder` (created) and return the folder.

    `max_shard_size="1GB"` gives a single `model.safetensors` without an index.
    """
    model = build_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    build_tokenizer().save_pretrained(folder)
    return Path(folder)
