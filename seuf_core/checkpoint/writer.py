"""Write a checkpoint that differs from its base in some tensors: plan, copy and patch, read back, rename.

The base is only read. Shards are copied and the changed byte ranges overwritten in the copies: what did not
change is bit-identical, and shown to be by digest before the folder gets its name. Not used: hard links
(writing through one would change the base) and a shard of overrides (from_pretrained reads every tensor of
every shard, and the file that sorts last wins).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from seuf_core.checkpoint.delta_file import DELTA, DeltaFacts, delta_bytes, write_delta
from seuf_core.checkpoint.index import CONFIG, INDEX, SINGLE, CheckpointIndex, TensorRecord, read_index
from seuf_core.checkpoint.inspect import TRAINABLE, model_digest, read_config
from seuf_core.checkpoint.manifest import MANIFEST, BaseRef, ChangedTensor, FileEntry, Manifest, sha256_file
from seuf_core.checkpoint.reader import TORCH_DTYPES, read_tensor, tensor_bytes, write_all
from seuf_core.checkpoint.staging import partial_of, refuse_if_full, staged, sync
from seuf_core.errors import ModelError, WriteError

# What belongs to a model beside its shards. A list of what may be copied, not of what may not: code, pickles,
# and whatever somebody keeps in the folder (data sets, logs) must not reach a published checkpoint.
_BELONGS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

_HASH_BYTES = 1 << 20

Progress = Callable[[int, int], None]  # bytes done, bytes in all; may raise to stop the writing


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything checked before a byte is written.

    Attributes:
        base: the folder to copy, absolute.
        index: of the base.
        changed: name on disk -> new value, any float dtype and device; cast one at a time when written.
        dirty: shard -> its changed tensors, in file order.
        files: names of every file to copy but config.json, which is copied last.
        bytes_total: to write, delta included.
    """

    base: Path
    index: CheckpointIndex
    changed: Mapping[str, torch.Tensor]
    dirty: dict[str, list[TensorRecord]]
    files: tuple[str, ...]
    bytes_total: int

    @property
    def records(self) -> list[TensorRecord]:
        """Every changed tensor, by shard and offset."""
        return [record for shard in sorted(self.dirty) for record in self.dirty[shard]]

    def on_disk(self, record: TensorRecord) -> torch.Tensor:
        """The new value as the file will hold it: CPU, contiguous, in the dtype on disk.

        The cast rounds to nearest. Training keeps fp32 masters and the checkpoint its base's dtype: what is
        evaluated must be what was rounded.
        """
        return _cast(record, self.changed[record.name])


def write_checkpoint(
    base: Path,
    out: Path,
    changed: Mapping[str, torch.Tensor],
    created_by: str,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write `base` with some tensors replaced to the new folder `out`, which appears whole or not at all.

    Memory: one tensor, cast, and 1 MiB.

    Args:
        base: folder of the base model; only read. Its files may be links (hub caches).
        changed: name on disk -> tensor of the shape on disk; cast to the dtype on disk. `name[3]` is row 3 of
            the first axis of a tensor (one expert of a fused one): its other rows stay the base's.
        created_by: program and version, for the manifest.
        extra: JSON for the manifest: method, seed, selection.
        progress: called with (bytes done, bytes in all), copying and reading back counted alike.

    Raises:
        WriteError: unknown_tensor, wrong_shape, not_finite, overlapping_tensors, output_exists, output_busy,
            output_in_base, disk_full, write_failed, verification_failed.
        ModelError: the base cannot be read.
    """
    facts = DeltaFacts(base="", created_by=created_by, extra=json.loads(json.dumps(extra or {})), shards={})
    return write_planned(plan(base, changed), out, facts, progress)


def plan(base: Path, changed: Mapping[str, torch.Tensor]) -> WritePlan:
    """Check names, shapes and values, and list what will be copied and patched. Writes nothing."""
    base = Path(base).absolute()
    read_config(base)
    index = read_index(base)
    dirty: dict[str, list[TensorRecord]] = {}
    for name, tensor in changed.items():
        record = _checked(index, name, tensor)
        dirty.setdefault(record.shard, []).append(record)
    for records in dirty.values():
        records.sort(key=lambda record: record.offset)
        _refuse_twice(records)
    files = (*(shard.name for shard in index.shards), *companions(base, index))
    size = sum((base / name).stat().st_size for name in (*files, CONFIG))
    return WritePlan(base, index, changed, dirty, files, size + delta_bytes(dirty))


def _checked(index: CheckpointIndex, name: str, tensor: torch.Tensor) -> TensorRecord:
    record = index.record(name)
    if record is None:
        raise WriteError(
            "unknown_tensor", f"{index.folder} has no tensor {name}.", "Give names as they are on disk."
        )
    if tuple(tensor.shape) != record.shape:
        raise WriteError(
            "wrong_shape", f"{name} has shape {tuple(tensor.shape)}, the file holds {record.shape}."
        )
    if record.dtype not in TRAINABLE:
        raise WriteError(
            "not_trainable", f"{name} is {record.dtype} on disk.", "Use a 16 or 32 bit checkpoint."
        )
    if not _cast(record, tensor).isfinite().all():
        raise WriteError(
            "not_finite", f"{name} has values that are no finite {record.dtype}.", "Lower the learning rate."
        )
    return record


def _refuse_twice(records: list[TensorRecord]) -> None:
    """A tensor and a row of it, given together, would say two things of the same bytes."""
    for record, following in pairwise(records):
        if following.offset < record.offset + record.bytes:
            raise WriteError(
                "overlapping_tensors",
                f"{record.name} and {following.name} are the same bytes of {record.shard}.",
                "Give the tensor or rows of it.",
            )


def _cast(record: TensorRecord, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", TORCH_DTYPES[record.dtype]).contiguous()


def companions(base: Path, index: CheckpointIndex) -> list[str]:
    """Names of what belongs to a model beside shards and config.json. Raises ModelError(incomplete_model)."""
    sharded = [shard.name for shard in index.shards] != [SINGLE]
    rules = (*_BELONGS, INDEX) if sharded else _BELONGS
    names = sorted(
        entry.name
        for entry in base.iterdir()
        if not entry.is_dir() and any(fnmatch(entry.name, rule) for rule in rules)
    )
    for name in names:
        if not (base / name).is_file():
            raise ModelError(
                "incomplete_model", f"{base / name} links to nothing.", "Download the model again."
            )
    return names


def write_planned(
    planned: WritePlan, out: Path, facts: DeltaFacts, progress: Progress | None = None
) -> Manifest:
    """Carry out a plan: `write_checkpoint` past its checks.

    `facts.base` is filled in here. `facts.shards`, when given, are the digests that the patched shards must
    have (apply_delta).
    """
    out = Path(out).absolute()
    _refuse_overlap(planned.base, out)
    base = BaseRef(
        digest=model_digest(planned.index), model_type=str(read_config(planned.base).get("model_type"))
    )
    meter = _Meter(progress, 2 * planned.bytes_total)
    with staged(out) as folder:
        refuse_if_full(folder, planned.bytes_total)
        meter.add(0)
        execute(planned, folder, meter.add)
        digests = verify(planned, folder, meter.add)
        _expect(facts.shards, digests)
        shards = {shard: digests[shard] for shard in sorted(planned.dirty)}
        written = replace(facts, base=base.digest, shards=shards)
        write_delta(folder / DELTA, planned.records, map(planned.on_disk, planned.records), written)
        digests[DELTA] = sha256_file(folder / DELTA)
        meter.add(0)
        # Without its config a folder is no model: it comes after everything was verified.
        _copy(planned.base, folder, CONFIG)
        digests[CONFIG] = _same(planned.base / CONFIG, folder / CONFIG, [])
        meter.add(0)
        manifest = _manifest(planned, folder, digests, base, written)
        (folder / MANIFEST).write_text(manifest.to_json())
        sync(folder / MANIFEST)
        meter.finish()
    return manifest


def execute(planned: WritePlan, folder: Path, done: Callable[[int], None]) -> None:
    """Copy every file but the config into `folder`, and overwrite the changed ranges in the copies.

    `done` hears the bytes as they are written; it may raise.
    """
    for name in planned.files:
        _copy(planned.base, folder, name)
        done((folder / name).stat().st_size)
        if name in planned.dirty:
            with (folder / name).open("r+b", buffering=0) as stream:
                for record in planned.dirty[name]:
                    write_all(stream.fileno(), tensor_bytes(planned.on_disk(record)), record.offset)
                    done(0)
            sync(folder / name)


def verify(planned: WritePlan, folder: Path, done: Callable[[int], None]) -> dict[str, str]:
    """Read the copies back: changed tensors are what was asked for, every other byte is the base's.

    Returns:
        Name -> sha256 of every file written so far, in hex.

    Raises:
        WriteError: verification_failed, naming the tensor or the file.
    """
    digests: dict[str, str] = {}
    for name in planned.files:
        records = planned.dirty.get(name, [])
        with (folder / name).open("rb", buffering=0) as stream:
            for record in records:
                # As bytes: equal floats may still differ in the sign of a zero.
                if tensor_bytes(read_tensor(stream.fileno(), record)) != tensor_bytes(
                    planned.on_disk(record)
                ):
                    raise _unverified(f"tensor {record.name} in {name}")
        digests[name] = _same(planned.base / name, folder / name, records)
        done((folder / name).stat().st_size)
    return digests


def _same(base: Path, copy: Path, changed: list[TensorRecord]) -> str:
    """The sha256 of `copy`, once it is known to equal `base` outside the changed tensors."""
    outside = _digest_outside(copy, changed)
    if outside != _digest_outside(base, changed):
        raise _unverified(copy.name)
    return sha256_file(copy) if changed else outside


def _digest_outside(path: Path, tensors: list[TensorRecord]) -> str:
    """sha256 of a file's bytes without those of some tensors (in file order)."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        ends = [0, *(record.offset + record.bytes for record in tensors)]
        begins = [*(record.offset for record in tensors), size]
        for at, end in zip(ends, begins, strict=True):
            while at < end and (piece := os.pread(stream.fileno(), min(_HASH_BYTES, end - at), at)):
                digest.update(piece)
                at += len(piece)
    return digest.hexdigest()


def _expect(expected: Mapping[str, str], digests: Mapping[str, str]) -> None:
    for shard, digest in expected.items():
        if digests.get(shard) != digest:
            raise _unverified(shard)


def _unverified(what: str) -> WriteError:
    return WriteError(
        "verification_failed",
        f"{what} does not read back as it was written.",
        "Check the disk and the memory.",
    )


def _refuse_overlap(base: Path, out: Path) -> None:
    inside, partial = base.resolve(), partial_of(out).resolve()
    if out.resolve().is_relative_to(inside) or inside.is_relative_to(partial):
        raise WriteError("output_in_base", f"{out} overlaps the base {base}.", "Choose a folder outside it.")


def _copy(base: Path, folder: Path, name: str) -> None:
    # Resolved first: hub caches hold links to blobs, and a copied link would still be the base's file.
    # copyfile beat copy_file_range by 3 to 6 times where it was measured.
    shutil.copyfile((base / name).resolve(strict=True), folder / name)
    sync(folder / name)


def _manifest(
    planned: WritePlan, folder: Path, digests: Mapping[str, str], base: BaseRef, facts: DeltaFacts
) -> Manifest:
    return Manifest(
        created_by=facts.created_by,
        base=base,
        files=tuple(
            FileEntry(name=name, bytes=(folder / name).stat().st_size, sha256=digests[name])
            for name in sorted(digests)
        ),
        changed=tuple(ChangedTensor(tensor=r.name, shard=r.shard, bytes=r.bytes) for r in planned.records),
        parameters_changed=sum(record.elements for record in planned.records),
        parameters_total=sum(record.elements for record in planned.index.tensors.values()),
        extra=facts.extra,
    )


class _Meter:
    """Adds up bytes for a Progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def finish(self) -> None:
        self.add(self._total - self._done)
