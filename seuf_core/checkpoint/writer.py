"""Write a checkpoint that differs from its base in some tensors: plan, share or copy and patch, read back, rename.

The base is only read. A shard that changes is copied with the new bytes in it; one that does not is shared with the
base where `Share` allows, else copied. What was copied is read back in the same pass, and known to be the base's
outside the changed tensors before the folder gets its name. Not used: a shard of overrides (from_pretrained reads
every tensor of every shard, and the file that sorts last wins).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from seuf_core.checkpoint.copying import Share, copy_patched, share_file, unverified
from seuf_core.checkpoint.delta_file import DELTA, DeltaFacts, delta_bytes, write_delta
from seuf_core.checkpoint.digests import Done, remember, remembered, sha256_of
from seuf_core.checkpoint.index import CONFIG, INDEX, SINGLE, CheckpointIndex, TensorRecord, read_index
from seuf_core.checkpoint.inspect import TRAINABLE, model_digest, read_config
from seuf_core.checkpoint.manifest import MANIFEST, BaseRef, ChangedTensor, FileEntry, Manifest, sha256_file
from seuf_core.checkpoint.reader import TORCH_DTYPES
from seuf_core.checkpoint.staging import partial_of, refuse_if_full, staged, sync
from seuf_core.checkpoint.threads import in_threads
from seuf_core.errors import ModelError, WriteError

# What belongs to a model beside its shards. A list of what may be copied, not of what may not: code, pickles,
# and whatever somebody keeps in the folder (data sets, logs) must not reach a published checkpoint.
_BELONGS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

Progress = Callable[[int, int], None]  # bytes done, bytes in all; may raise to stop the writing


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything checked before a byte is written.

    Attributes:
        base: the folder it is made from, absolute.
        index: of the base.
        changed: name on disk -> new value, any float dtype and device; cast one at a time when written.
        dirty: shard -> its changed tensors, in file order.
        files: names of every file of the base that belongs to the model, but config.json, which comes last.
    """

    base: Path
    index: CheckpointIndex
    changed: Mapping[str, torch.Tensor]
    dirty: dict[str, list[TensorRecord]]
    files: tuple[str, ...]

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
    share: Share = "reflink",
) -> Manifest:
    """Write `base` with some tensors replaced to the new folder `out`, which appears whole or not at all.

    Memory: 3 MiB and one tensor, cast, for each of up to four shards at once.
    Bytes written: the dirty shards and the small files; of shared shards none; of a dirty shard on a file system with
    reflinks its changed tensors.

    Args:
        base: folder of the base model; only read. Its files may be links (hub caches).
        changed: name on disk -> tensor of the shape on disk; cast to the dtype on disk. `name[3]` is row 3 of
            the first axis of a tensor (one expert of a fused one): its other rows stay the base's.
        created_by: program and version, for the manifest.
        extra: JSON for the manifest: method, seed, selection.
        progress: called with (bytes done, bytes in all): of files copied, and of shared ones read for their digest.
        share: what an unchanged shard may share with the base. With "reflink" nothing that is done later to one of
            the two folders can reach the other. "hardlink" never copies on the base's own file system, but the two
            folders then hold one file: only for folders into whose files nobody writes.

    Raises:
        WriteError: unknown_tensor, wrong_shape, not_finite, overlapping_tensors, output_exists, output_busy,
            output_in_base, disk_full, write_failed, verification_failed.
        ModelError: the base cannot be read.
    """
    facts = DeltaFacts(base="", created_by=created_by, extra=json.loads(json.dumps(extra or {})), files={})
    return write_planned(plan(base, changed), out, facts, progress, share)


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
    return WritePlan(base, index, changed, dirty, files)


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
    planned: WritePlan,
    out: Path,
    facts: DeltaFacts,
    progress: Progress | None = None,
    share: Share = "reflink",
) -> Manifest:
    """Carry out a plan: `write_checkpoint` past its checks.

    `facts.base` is filled in here. `facts.files`, when given, are the digests that the files must have
    (apply_delta): then each is read, and none taken from the cache.
    """
    out = Path(out).absolute()
    _refuse_overlap(planned.base, out)
    base = BaseRef(
        digest=model_digest(planned.index), model_type=str(read_config(planned.base).get("model_type"))
    )
    with staged(out) as folder:
        made = _made(planned, folder, share, remember_digests=not facts.files)
        refuse_if_full(folder, made.bytes_to_write)
        meter = _Meter(progress, made.bytes_to_do)
        digests = execute(made, meter.add)
        _expect(facts.files, digests)
        written = replace(facts, base=base.digest, files=digests)
        values = map(planned.on_disk, planned.records)
        promised = write_delta(folder / DELTA, planned.records, values, written)
        digests = {**digests, DELTA: sha256_file(folder / DELTA)}
        if digests[DELTA] != promised:
            raise unverified(DELTA)
        meter.add(0)
        manifest = _manifest(planned, folder, digests, base, written)
        (folder / MANIFEST).write_text(manifest.to_json())
        sync(folder / MANIFEST)
        meter.finish()
    return manifest


@dataclass(frozen=True, slots=True)
class _Making:
    """How each file of a folder comes to be; what could be shared with the base stands there already.

    Attributes:
        how: name -> reflink, hardlink or copy, for every file but config.json.
        known: name -> digest, of the unchanged shards of which it is remembered.
        bytes_to_write: that the disk must have free: what is not shared.
        bytes_to_do: for progress: every file that is copied, or read for its digest.
    """

    planned: WritePlan
    folder: Path
    how: Mapping[str, Share]
    known: Mapping[str, str]
    remember_digests: bool

    @property
    def bytes_to_write(self) -> int:
        """Copies whole; of reflinks the changed tensors; the delta."""
        sizes = {name: self.size(name) for name in (*self.how, CONFIG)}
        copied = sum(size for name, size in sizes.items() if self.how.get(name, "copy") == "copy")
        patched = sum(
            record.bytes for name, records in self.planned.dirty.items() if self.how[name] != "copy"
            for record in records
        )  # fmt: skip
        return copied + patched + delta_bytes(self.planned.dirty)

    @property
    def bytes_to_do(self) -> int:
        """Every file that is not there yet with a digest that is known."""
        return sum(map(self.size, (*self.to_make, CONFIG)))

    @property
    def to_make(self) -> list[str]:
        """Names of the files to copy, patch or read for their digest, the longest work first; without config.json."""
        names = [name for name in self.how if self.how[name] == "copy" or name not in self.known]
        # What is copied takes longer than what is only hashed.
        return sorted(names, key=lambda name: -self.size(name) * (1 + (self.how[name] == "copy")))

    def size(self, name: str) -> int:
        """Of the base's file, which is that of ours."""
        return (self.planned.base / name).stat().st_size

    def make(self, name: str, done: Done) -> str:
        """Make one file, if it is not there, and return its digest."""
        source, target = self.planned.base / name, self.folder / name
        records, how = self.planned.dirty.get(name, ()), self.how.get(name, "copy")
        before, known = source.stat(), self.known.get(name)
        if how == "copy" or records:
            digest = copy_patched(
                source, target, records, self.planned.on_disk, done, reflinked=how == "reflink", known=known
            )
        else:
            digest = sha256_of(target, done)  # its bytes are the base's own
        if self.remember_digests and not records and target.suffix == ".safetensors":
            remember(source, before, digest)
        return digest


def _made(planned: WritePlan, folder: Path, share: Share, *, remember_digests: bool) -> _Making:
    """Share with the base what can be shared: an instant, after which it is known how much must be written.

    A shard that changes may be a reflink, never a hard link. What a person may edit (tokenizer, licence) is copied.
    """
    how: dict[str, Share] = dict.fromkeys(planned.files, "copy")
    for shard in planned.index.shards:
        allowed: Share = "reflink" if shard.name in planned.dirty and share != "copy" else share
        how[shard.name] = share_file(planned.base / shard.name, folder / shard.name, allowed)
    clean = how.keys() & {shard.name for shard in planned.index.shards} - planned.dirty.keys()
    known: dict[str, str] = {}
    if remember_digests:
        digests = {name: remembered(planned.base / name) for name in clean}
        known = {name: digest for name, digest in digests.items() if digest}
    return _Making(planned, folder, how, known, remember_digests)


def execute(making: _Making, done: Done) -> dict[str, str]:
    """Make every file, the large ones first and several at once; config.json last, when all others are verified.

    Without its config a folder is no model: what a killed writer leaves behind cannot be mistaken for one.

    Returns:
        Name -> sha256, in hex.

    Raises:
        WriteError: verification_failed, naming the tensor or the file; and whatever `done` raises.
    """
    done(0)
    names = making.to_make
    digests = in_threads([partial(making.make, name) for name in names], done)
    found = {**making.known, **dict(zip(names, digests, strict=True))}
    return {**found, CONFIG: in_threads([partial(making.make, CONFIG)], done)[0]}


def _expect(expected: Mapping[str, str], digests: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        if digests.get(name) != digest:
            raise WriteError(
                "verification_failed",
                f"{name} of the result is not the file that the delta promises.",
                "Give the base it was made from, unchanged, and the delta as it was written.",
            )


def _refuse_overlap(base: Path, out: Path) -> None:
    inside, partial = base.resolve(), partial_of(out).resolve()
    if out.resolve().is_relative_to(inside) or inside.is_relative_to(partial):
        raise WriteError("output_in_base", f"{out} overlaps the base {base}.", "Choose a folder outside it.")


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
