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

from tests.tiny_configs import CONFIGS, INITIALIZER_RANGE, SHAPE, SPECIAL_TOKENS
from tests.tiny_configs import VOCAB_SIZE as VOCAB_SIZE

# A handful, for tests of what no family changes; tests/families goes through every row.
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2")
DENSE = ("llama", "qwen2")


def build_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 CPU model in eval mode; `overrides` are config fields. Same seed, same weights."""
    class_name, fields = CONFIGS[family]
    config = getattr(transformers, class_name)(**{**SHAPE, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        _fill_zeros(model)
    return model.eval()


@torch.no_grad()
def _fill_zeros(model: PreTrainedModel) -> None:
    """Some families start the biases of experts, routers and selection at 0, Trinity its routers: with zeros in
    them, nobody would notice that they were left out."""
    state = model.state_dict()
    for name in sorted(state):
        if name.endswith(("_bias", "router.bias", "router.gate.weight")) and not state[name].any():
            state[name].normal_(0, INITIALIZER_RANGE)


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
