"""Look at a model folder and say what it is, or why it cannot be used. Torch-free, milliseconds."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seuf_core.checkpoint.index import CONFIG, CheckpointIndex, TensorRecord, read_index, read_json
from seuf_core.errors import ModelError
from seuf_core.families import (
    FAMILIES,
    family_of,
    has_experts,
    num_experts,
    num_experts_per_tok,
    num_layers,
)

# Bytes of each tensor that enter the digest: at its start and at its middle.
SAMPLE_BYTES = 256

TRAINABLE = frozenset({"F16", "BF16", "F32", "F64"})


# Quantisation methods, as config.json names them, that seuf_core.checkpoint.dequantise undoes.
DEQUANTISABLE = frozenset({"fp8", "mxfp4"})
_USE_FULL = "Use the 16 or 32 bit checkpoint it was made from, and quantise the result."

# Endings of `architectures` in config.json that AutoModelForCausalLM opens.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A usable checkpoint, of a Mixture-of-Experts model or of a dense one.

    Attributes:
        path: the folder, absolute.
        moe_layers: indices of the layers that have experts; the others are dense. Empty for a dense model.
        num_experts: routed experts a layer; num_experts_per_tok: those a token is sent to. 0 for a dense model.
        parameters: elements of all tensors on disk.
        bytes: of all tensors on disk.
        dtype: as safetensors writes it, the one with the most bytes.
        digest: see `model_digest`.
    """

    path: Path
    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    parameters: int
    bytes: int
    dtype: str
    digest: str


def inspect_model(path: Path) -> ModelFacts:
    """Facts of a folder that holds a causal language model in safetensors: of a family with a row, or dense.

    Raises:
        ModelError: model_not_found, not_a_model, not_a_language_model, unknown_architecture, quantised,
            incomplete_config, no_safetensors, incomplete_shards, broken_shard, ambiguous_tensor, or
            unexpected_layout.
    """
    folder = Path(path).absolute()
    config = read_config(folder)
    model_type = _model_type(folder, config)
    index = read_index(folder)
    records = index.tensors.values()
    by_dtype: Counter[str] = Counter()
    for record in records:
        by_dtype[record.dtype] += record.bytes
    dtype = by_dtype.most_common(1)[0][0] if by_dtype else "none"
    if dtype not in TRAINABLE:
        raise _quantised(folder, f"stored as {dtype}")
    layers = _moe_layers(index, model_type, config)
    return ModelFacts(
        path=folder,
        model_type=model_type,
        num_layers=num_layers(config),
        moe_layers=layers,
        num_experts=num_experts(config) if layers else 0,
        num_experts_per_tok=num_experts_per_tok(config) if layers else 0,
        parameters=sum(record.elements for record in records),
        bytes=by_dtype.total(),
        dtype=dtype,
        digest=model_digest(index),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError(model_not_found, not_a_model)."""
    if not folder.is_dir():
        raise ModelError("model_not_found", f"{folder} is not a folder.", "Give the folder of a saved model.")
    if not (folder / CONFIG).is_file():
        raise ModelError(
            "not_a_model", f"{folder} has no {CONFIG}.", "Give the folder that save_pretrained wrote."
        )
    return read_json(folder / CONFIG)


def model_digest(index: CheckpointIndex) -> str:
    """A cheap name for a model's content: sha256 in hex, "sha256:" in front.

    Over config.json; each shard's name, size and header; and of every tensor SAMPLE_BYTES from its start and
    from its middle. Headers alone would call a model and its fine-tuned copy the same. It tells models apart;
    it does not prove that no byte was touched: the full digests of a Manifest do.
    """
    digest = hashlib.sha256()
    _add(digest, (index.folder / CONFIG).read_bytes())
    for shard in index.shards:
        _add(digest, shard.name.encode())
        _add(digest, shard.size.to_bytes(8))
        _add(digest, shard.header)
        records = sorted(
            (record for record in index.tensors.values() if record.shard == shard.name),
            key=lambda record: record.offset,
        )
        with (index.folder / shard.name).open("rb", buffering=0) as stream:
            for record in records:
                _add(digest, _sample(stream.fileno(), record))
    return f"sha256:{digest.hexdigest()}"


def _add(digest: hashlib._Hash, part: bytes) -> None:
    digest.update(len(part).to_bytes(8) + part)  # with lengths, no two lists of parts give the same bytes


def _sample(file: int, record: TensorRecord) -> bytes:
    if record.bytes <= 2 * SAMPLE_BYTES:
        return os.pread(file, record.bytes, record.offset)
    middle = record.offset + record.bytes // 2
    return os.pread(file, SAMPLE_BYTES, record.offset) + os.pread(file, SAMPLE_BYTES, middle)


def _model_type(folder: Path, config: dict[str, Any]) -> str:
    """The model type of a config that can be used: a language model, known or dense, not quantised."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "not_a_model",
            f"{folder / CONFIG} has no model_type.",
            "Restore the config it was published with.",
        )
    if model_type not in FAMILIES and has_experts(config):
        family_of(model_type)  # says which are known
    classes = config.get("architectures") or []
    if classes and not any(str(name).endswith(_LANGUAGE_MODELS) for name in classes):
        raise ModelError(
            "not_a_language_model",
            f"{folder} holds a {', '.join(map(str, classes))}, which is no causal language model.",
            "Use a model that AutoModelForCausalLM opens.",
        )
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        fix = f"Run python -m seuf_core.checkpoint.dequantise {folder} OUT, which writes its bfloat16 form."
        raise _quantised(
            folder, str(method or "no quant_method named"), fix if method in DEQUANTISABLE else _USE_FULL
        )
    return model_type


def _quantised(folder: Path, how: str, fix: str = _USE_FULL) -> ModelError:
    return ModelError(
        "quantised",
        f"The weights of {folder} are quantised ({how}): they cannot be trained.",
        fix,
    )


def _moe_layers(index: CheckpointIndex, model_type: str, config: dict[str, Any]) -> tuple[int, ...]:
    """The layers with experts: each must have all of its family's row on disk, in a dtype that can be trained."""
    family = FAMILIES.get(model_type)
    if family is None:
        return ()
    layers = family.moe_layers(index.tensors.__contains__, config)
    if not layers and not has_experts(config):
        return ()
    wanted = [name for layer in layers for name in family.layer_names(layer, num_experts(config))]
    # A layer that lost its router would be taken for a dense one.
    for layer in set(range(num_layers(config))) - set(layers):
        names = family.layer_names(layer, 1)
        if not layers or any(index.record(name) for name in names):
            wanted += names
    for name in wanted:
        record = index.record(name)
        if record is None:
            raise ModelError(
                "unexpected_layout",
                f"{index.folder} has no tensor {name}, which {model_type} keeps on disk.",
                "Save the model again with save_pretrained of transformers 5.",
            )
        if record.dtype not in TRAINABLE:
            raise _quantised(index.folder, f"{name} is {record.dtype}")
    return layers
