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
from seuf_core.families import FAMILIES, Family, family_of, has_experts

# Bytes of each tensor that enter the digest: at its start and at its middle.
SAMPLE_BYTES = 256

TRAINABLE = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A usable Mixture-of-Experts checkpoint.

    Attributes:
        path: the folder, absolute.
        moe_layers: indices of the layers that have experts; the others are dense.
        num_experts: routed experts a layer.
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
    """Facts of a folder that holds a supported Mixture-of-Experts model in safetensors.

    Raises:
        ModelError: model_not_found, not_a_model, dense_model, unknown_architecture, quantised,
            incomplete_config, no_safetensors, incomplete_shards, broken_shard, ambiguous_tensor, or
            unexpected_layout.
    """
    folder = Path(path).absolute()
    config = read_config(folder)
    family = _family(folder, config)
    layers = family.moe_layers(config)
    if not layers:
        raise _dense(folder, config)
    index = read_index(folder)
    _check_layout(index, family, config)
    records = index.tensors.values()
    by_dtype: Counter[str] = Counter()
    for record in records:
        by_dtype[record.dtype] += record.bytes
    return ModelFacts(
        path=folder,
        model_type=family.model_type,
        num_layers=config["num_hidden_layers"],
        moe_layers=layers,
        num_experts=family.num_experts(config),
        num_experts_per_tok=family.num_experts_per_tok(config),
        parameters=sum(record.elements for record in records),
        bytes=by_dtype.total(),
        dtype=by_dtype.most_common(1)[0][0],
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


def _family(folder: Path, config: dict[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "not_a_model",
            f"{folder / CONFIG} has no model_type.",
            "Restore the config it was published with.",
        )
    if model_type not in FAMILIES and not has_experts(config):
        raise _dense(folder, config)
    family = family_of(model_type)
    if config.get("quantization_config"):
        raise _quantised(folder)
    return family


def _dense(folder: Path, config: dict[str, Any]) -> ModelError:
    return ModelError(
        "dense_model",
        f"{folder} ({config.get('model_type')}) has no experts: selected-expert unlearning needs some.",
        f"Use a Mixture-of-Experts model of one of: {', '.join(sorted(FAMILIES))}.",
    )


def _quantised(folder: Path) -> ModelError:
    return ModelError(
        "quantised",
        f"The weights of {folder} are quantised: they cannot be trained.",
        "Use the 16 or 32 bit checkpoint and quantise the result.",
    )


def _check_layout(index: CheckpointIndex, family: Family, config: dict[str, Any]) -> None:
    """Every expert and router of the family's row must be on disk, in a dtype that can be trained."""
    experts = range(family.num_experts(config))
    for layer in family.moe_layers(config):
        names = [family.router_name(layer)]
        names += [name for expert in experts for name in family.expert_names(layer, expert)]
        for name in names:
            record = index.tensors.get(name)
            if record is None:
                raise ModelError(
                    "unexpected_layout",
                    f"{index.folder} has no tensor {name}, which {family.model_type} keeps on disk.",
                    "Save the model again with save_pretrained of transformers 5.",
                )
            if record.dtype not in TRAINABLE:
                raise _quantised(index.folder)
