"""delta.safetensors: the changed tensors alone, and what they change. An ordinary safetensors file.

Its metadata entry "seuf" holds the base's digest and the digests that the checkpoint's files must have, so that
`seuf_core.checkpoint.delta.apply_delta` can rebuild the checkpoint from base and delta and know that it did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from seuf_core.checkpoint.index import TensorRecord, read_shard
from seuf_core.checkpoint.reader import read_tensor, tensor_bytes
from seuf_core.checkpoint.staging import sync
from seuf_core.errors import WriteError

DELTA = "delta.safetensors"
_KEY = "seuf"


@dataclass(frozen=True, slots=True)
class DeltaFacts:
    """What a delta says of itself.

    Attributes:
        base: digest of the model it applies to (seuf_core.checkpoint.inspect.model_digest).
        created_by, extra: as in the manifest, so that an applied delta gives the same folder, byte for byte.
        files: name of every file of the checkpoint but the delta and the manifest -> its sha256, in hex.
    """

    base: str
    created_by: str
    extra: dict[str, Any]
    files: dict[str, str]


def delta_bytes(dirty: Mapping[str, Sequence[TensorRecord]]) -> int:
    """About how large the file will be: its tensors, and 200 bytes of header for each."""
    return sum(record.bytes + 200 for records in dirty.values() for record in records)


def write_delta(
    path: Path,
    records: Sequence[TensorRecord],
    tensors: Iterable[torch.Tensor],
    facts: DeltaFacts,
) -> str:
    """Write tensors, given in their records' dtypes, one in memory at a time. Same input, same bytes.

    By hand, because the library needs every tensor in memory and orders its metadata by a random hash.

    Returns:
        sha256 of what was written, in hex.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", _KEY: json.dumps(asdict(facts), sort_keys=True)}
    }
    at = 0
    for record in records:
        header[record.name] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [at, at + record.bytes],
        }
        at += record.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for part in chain((head,), map(tensor_bytes, tensors)):
            digest.update(part)
            stream.write(part)
    sync(path)
    return digest.hexdigest()


def read_delta(path: Path) -> tuple[dict[str, torch.Tensor], DeltaFacts]:
    """Tensors and facts of a delta file. Memory: its size.

    Raises:
        WriteError: not_a_delta.
        ModelError: broken_shard, incomplete_shards.
    """
    if not path.is_file():
        raise WriteError(
            "not_a_delta", f"{path} is not a file.", f"Give the {DELTA} of a written checkpoint."
        )
    shard, records = read_shard(path.parent, path.name)
    try:
        facts = DeltaFacts(**json.loads(json.loads(shard.header[8:])["__metadata__"][_KEY]))
        if not isinstance(facts.files, dict):
            raise TypeError(facts.files)
    except (KeyError, TypeError, ValueError) as error:
        raise WriteError(
            "not_a_delta",
            f"{path} does not say what it changes.",
            f"Give the {DELTA} of a written checkpoint.",
        ) from error
    with path.open("rb", buffering=0) as stream:
        return {record.name: read_tensor(stream.fileno(), record) for record in records}, facts
