"""Checkpoints of random weights at the shapes of published models, written tensor by tensor.

`write_shape("olmoe-1b-7b", folder)` gives what `from_pretrained` opens and what a publisher's folder looks like:
the family's own names on disk, every expert with tensors of its own, shards of 5 GB, an index, a tokenizer whose
vocabulary has the model's size. Names and shapes come from the model on the meta device by transformers' own
reversal of what it does while loading, so no weight is ever in memory but one tensor's.

    python -m benchmarks.shapes olmoe-1b-7b build/shapes/olmoe-1b-7b
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from seuf_core.checkpoint.index import INDEX, SINGLE
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.view import MoEView, moe_view

SHARD_BYTES: Final = 5_000_000_000  # as published models have them
# Random numbers are drawn once and read from another place for each tensor. A prime, so that no two rows of a
# tensor, which are a power of two long, are the same however often a large tensor goes round.
POOL: Final = 33_554_393
SMALL_POOL: Final = 1_048_573  # of a model that has no more weights than that; a prime too
STANDARD_DEVIATION: Final = 0.02
# Times the other weights: what a token is outweighs what attention takes from its neighbours, which in a model of
# random weights would otherwise send all tokens of a text to the same experts.
EMBEDDING: Final = 50.0
SHARPER: Final = 4.0  # times the weights of the other routers
_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Shape:
    """A model's config class of transformers, its fields, and the dtype of its files.

    layers: decoder layers at which experts are trained: an early, a middle and a late one.
    """

    config: str
    fields: dict[str, Any]
    dtype: torch.dtype
    layers: tuple[int, int, int]

    def make_config(self, **changed: Any) -> PretrainedConfig:
        """The config of transformers, with some fields changed."""
        fields = {"use_cache": False, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None}
        config = getattr(transformers, self.config)(**{**fields, "eos_token_id": 1, **self.fields, **changed})
        config.dtype = self.dtype
        result: PretrainedConfig = config
        return result


_ATTENTION_16: Final = {"num_attention_heads": 16, "num_key_value_heads": 16}
SHAPES: Final[dict[str, Shape]] = {
    # Not published: what a small machine trains in fp32, for comparisons of weights to many digits.
    "olmoe-125m": Shape(
        "OlmoeConfig",
        {
            "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 32, "num_experts_per_tok": 4,
        },
        torch.float32,
        (1, 4, 6),
    ),
    # Not published: a model that is in memory several times over, so that every naive way can be had.
    "qwen2-moe-1b": Shape(
        "Qwen2MoeConfig",
        {
            "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
            **_ATTENTION_16, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 704,
            "shared_expert_intermediate_size": 2816,
        },
        torch.bfloat16,
        (1, 6, 10),
    ),
    "olmoe-1b-7b": Shape(
        "OlmoeConfig",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            **_ATTENTION_16, "num_experts": 64, "num_experts_per_tok": 8,
        },
        torch.bfloat16,
        (1, 8, 14),
    ),
    "qwen1.5-moe-a2.7b": Shape(
        "Qwen2MoeConfig",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            **_ATTENTION_16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        torch.bfloat16,
        (1, 12, 22),
    ),
    "deepseek-v2-lite": Shape(
        "DeepseekV2Config",
        {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
            **_ATTENTION_16, "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy",
            "n_group": 1, "topk_group": 1,
        },
        torch.bfloat16,
        (1, 13, 25),
    ),
    "qwen3-30b-a3b": Shape(
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        },
        torch.bfloat16,
        (1, 24, 46),
    ),
}  # fmt: skip
# What makes any of them small enough for a test of a second: the structure stays. Same dtype.
TINY: Final[dict[str, Any]] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
_TINY_EXPERTS: Final[dict[str, dict[str, Any]]] = {
    "OlmoeConfig": {"num_experts": 8, "num_experts_per_tok": 2},
    "Qwen2MoeConfig": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "DeepseekV2Config": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    },
    "Qwen3MoeConfig": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip
TINY_LAYERS: Final = (1, 2, 3)


def tiny_fields(name: str) -> dict[str, Any]:
    """The config fields that make shape `name` a model of some hundred kB."""
    return TINY | _TINY_EXPERTS[SHAPES[name].config]


def write_shape(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    sharp_layer: int | None = None,
    **changed: Any,
) -> Path:
    """Write a checkpoint of shape `name` into `folder` (created) and return the folder.

    Weights are normal with a standard deviation of .02, those of embeddings 1; norms are 1, biases 0. Memory: the pool
    of random numbers (134 MB, in bf16 half of that at the end) and, of an embedding, a piece as large.

    Args:
        sharp_layer: a decoder layer whose router is surer than the others, so that the experts with the highest
            affinity are there, and a job trains one of them.
        changed: config fields that differ from the shape's, such as num_hidden_layers.
    """
    shape = SHAPES[name]
    config = shape.make_config(**changed)
    view = meta_view(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(view).items()}
    folder.mkdir(parents=True, exist_ok=True)
    scales = {name: EMBEDDING for name in shapes if name.endswith("embed_tokens.weight")}
    if sharp_layer is not None:
        scales[view.family.router_names(sharp_layer)["weight"]] = SHARPER
    _write_shards(folder, shapes, shape.dtype, seed, shard_bytes, scales)
    config.architectures = [type(view.model).__name__]
    config.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def meta_view(config: PretrainedConfig) -> MoEView:
    """The model of a config without any weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return moe_view(model)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `t3` to `t<V-1>`, one token each, so that a text names its token ids; before them stand padding, end of
    text and unknown word, whose names are no beginning of a word: they are cut out of any text first."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"t{index}": index for index in range(3, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _write_shards(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    seed: int,
    shard_bytes: int,
    scales: dict[str, float],
) -> None:
    shards = _shards(shapes, dtype.itemsize, shard_bytes)
    size = sum(map(math.prod, shapes.values()))
    drawn = torch.randn(
        POOL if size > SMALL_POOL else SMALL_POOL, generator=torch.Generator().manual_seed(seed)
    )
    pool = drawn.mul_(STANDARD_DEVIATION).to(dtype)
    places = random.Random(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                for part in _values(name, math.prod(shapes[name]), pool, places.randrange(len(pool))):
                    part = part * scales[name] if name in scales else part
                    out.write(part.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size * dtype.itemsize}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names in the model's order, as many a shard as fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Length and JSON of a safetensors file whose tensors follow each other in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _values(name: str, count: int, pool: torch.Tensor, start: int) -> Iterator[torch.Tensor]:
    """The `count` values of a tensor, in pieces: norms 1, biases 0, else the pool from `start` on, round and round."""
    if name.endswith("norm.weight") or name.endswith(".bias"):
        yield torch.full((count,), float(name.endswith("norm.weight")), dtype=pool.dtype)
        return
    while count > 0:
        part = pool[start : start + count]
        yield part
        count -= len(part)
        start = 0


if __name__ == "__main__":
    write_shape(sys.argv[1], Path(sys.argv[2]))
