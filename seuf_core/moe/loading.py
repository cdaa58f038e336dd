"""Tensors of a checkpoint folder as the model in memory has them: renamed, fused, in its dtypes.

transformers' own mapping says which tensors on disk make which in memory; nothing here knows a family. Where it only
renames, or stacks the experts of a layer, bytes go from the file to their place in the tensor without a copy between.
Whatever else it does to a tensor is done by its own converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from seuf_core.checkpoint.reader import CheckpointReader
from seuf_core.errors import ModelError


@dataclass(frozen=True)
class Source:
    """What is read together: names on disk by the pattern they matched, and what is made of them.

    converter: transformers' own; None where the tensor on disk is the one in memory.
    stacked: whether the converter does no more than give each expert its place.
    """

    converter: Any
    stacked: bool
    names: dict[str, list[str]] = field(default_factory=dict)


class Loader:
    """Reads tensors by their names in memory.

    Args:
        model: on the meta device, with the dtypes that its parameters are to have.
        reader: of the folder. Tensors there that are no part of the model are never read.
    """

    def __init__(self, model: PreTrainedModel, reader: CheckpointReader) -> None:
        self._model, self._reader = model, reader
        self._meta: dict[str, torch.Tensor] = model.state_dict()
        mapping: list[Any] = get_model_conversion_mapping(model)
        self._sources = _sources(model, self._meta, mapping, reader.index.tensors)
        # What `revert_weight_conversion` reads; from_pretrained leaves it on a model as well.
        model.__dict__["_weight_conversions"] = [used for used in mapping if used.was_used()]

    @property
    def missing(self) -> set[str]:
        """Names in memory that nothing on disk makes. One source may make several."""
        made = {name for first, source in self._sources.items() for name in self._made(first, source)}
        return set(self._meta) - made

    def read(self, prefix: str, *, outside: bool = False) -> dict[str, torch.Tensor]:
        """Every tensor whose name in memory starts with `prefix` (or, `outside`, does not), on the CPU.

        Bound: their bytes, held once; twice those of one source that is cast or really converted.

        Raises:
            ModelError: mismatched_tensor, when a shape is not the model's; and as `CheckpointReader.tensor` does.
        """
        found: dict[str, torch.Tensor] = {}
        for name, source in self._sources.items():
            if name.startswith(prefix) != outside:
                found |= self._read(name, source)
        return found

    def announce(self, prefix: str) -> None:
        """Let the system fetch what `read` will ask for into the page cache; returns at once."""
        for name, source in self._sources.items():
            if name.startswith(prefix):
                for names in source.names.values():
                    self._reader.announce(names)

    def _read(self, name: str, source: Source) -> dict[str, torch.Tensor]:
        meta = self._meta[name]
        if source.converter is None or source.stacked:
            tensor = torch.empty(meta.shape, dtype=meta.dtype)
            for disk, place in self._places(name, source, tensor):
                self._into(name, disk, place)
            return {name: tensor}
        converter = deepcopy(source.converter)
        for pattern, names in source.names.items():
            for disk in names:
                converter.add_tensor(name, disk, pattern, self._reader.tensor(disk).to(meta.dtype))
        made = converter.convert(name, model=self._model, config=self._model.config)
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        for key, value in tensors.items():
            self._check(key, value.shape, self._meta[key].shape)
        # A converter may give parts of one tensor: each is to be freed by itself.
        return {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}

    def _places(self, name: str, source: Source, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Each name on disk and its part of the tensor in memory."""
        patterns = [pattern for pattern in _patterns(source) if pattern in source.names]
        if source.converter is None:
            return [(source.names[patterns[0]][0], tensor)]
        counts = {len(source.names[pattern]) for pattern in patterns}
        self._check(name, sorted(counts), [tensor.shape[0]])
        return [
            (disk, part)
            for expert in range(tensor.shape[0])
            for disk, part in zip(
                [source.names[pattern][expert] for pattern in patterns],
                tensor[expert].chunk(len(patterns)),  # gate above up
                strict=True,
            )
        ]

    def _into(self, name: str, disk: str, place: torch.Tensor) -> None:
        self._check(name, self._reader.index.tensors[disk].shape, place.shape)
        self._reader.read_into(disk, place)

    def _made(self, first: str, source: Source) -> list[str]:
        targets = source.converter.target_patterns if source.converter is not None else []
        if len(targets) < 2:
            return [first]
        return [first.replace(targets[0], target) for target in targets]

    def _check(self, name: str, found: Iterable[int], wanted: Iterable[int]) -> None:
        if list(found) != list(wanted):
            raise ModelError(
                "mismatched_tensor",
                f"{name} is {list(found)} on disk and must be {list(wanted)}, as config.json has it.",
                "Restore the config.json that the model was published with.",
            )


def _sources(
    model: PreTrainedModel, meta: dict[str, torch.Tensor], mapping: list[Any], names: Iterable[str]
) -> dict[str, Source]:
    """First name in memory -> its source, as `convert_and_load_state_dict_in_model` pairs them."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    for disk in sorted(
        names, key=dot_natural_key
    ):  # some renamings depend on the order; experts are in theirs
        name, pattern = rename_source_key(disk, renamings, converters, prefix, meta)
        if name not in meta and disk in meta:
            name, pattern = rename_source_key(disk, [], [], prefix, meta)
        if name not in meta:
            continue
        converter = None if pattern is None else by_pattern[pattern]
        source = sources.setdefault(name, Source(converter, _stacks(converter)))
        source.names.setdefault(pattern or disk, []).append(disk)
    return sources


def _stacks(converter: Any) -> bool:
    """Whether a converter only stacks experts, and lays one projection above another."""
    if converter is None or len(converter.target_patterns) != 1:
        return False
    kinds = [(type(operation), operation.__dict__.get("dim")) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _patterns(source: Source) -> list[str]:
    return list(source.names) if source.converter is None else list(source.converter.source_patterns)


def kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name in memory -> its dtype, where the family keeps a tensor in another than the model's."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    found, by_group, _ = build_glob_alternation(list(plan))
    matches = {name: re.search(found, name) for name in model.state_dict()}
    return {name: plan[by_group[str(match.lastgroup)]] for name, match in matches.items() if match}
