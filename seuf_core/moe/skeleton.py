"""A model whose decoder layers are on disk: its modules without weights, and a layer's weights when they are needed.

`open_model` gives what `from_pretrained(folder, dtype="auto")` gives, to the last bit of every parameter and buffer,
but for the decoder layers, which hold nothing until `MoEView.weights` loads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import _get_dtype
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.generic import ContextManagers

from seuf_core import allocator
from seuf_core.checkpoint.index import CheckpointIndex
from seuf_core.checkpoint.reader import CheckpointReader
from seuf_core.errors import ModelError
from seuf_core.moe.grouped import use_grouped
from seuf_core.moe.loading import Loader, kept_dtypes
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.moe.weights import Streamed


def open_model(folder: Path, device: torch.device | str = "cpu", *, prefetch: bool = False) -> MoEView:
    """Open a model in the dtype it is stored in, in eval mode: embeddings, final norm and head, and no layer.

    Memory: the bytes of what is outside the decoder layers, and of each layer while `MoEView.weights` has it loaded;
    with `prefetch` of the next one too, which is read by another thread then instead of only fetched by the kernel.
    A layer is read from disk anew each time; the files stay open for as long as the view lives. No remote code.

    Raises:
        ModelError: missing_tensors or mismatched_tensor, when the files do not hold the model of their config;
            unknown_architecture; and as `seuf_core.checkpoint.index.read_index` does.
    """
    allocator.settle()
    reader = CheckpointReader(folder)
    model, dtype = _modules(folder, reader.index)
    kept = kept_dtypes(model, dtype)
    for (
        name,
        empty,
    ) in model.state_dict().items():  # as from_pretrained leaves them, whatever the family begins with
        _set(model, name, empty.to(kept.get(name, empty.dtype)))
    loader, stem = Loader(model, reader), _stem(model)
    _refuse_missing(model, loader.missing)
    for name, tensor in loader.read(stem, outside=True).items():
        _set(model, name, tensor.to(device))
    _finish(model, loader.missing, torch.device(device))

    def read(layer: int) -> dict[str, torch.Tensor]:
        prefix = f"{stem}{layer}."
        tensors = loader.read(prefix)
        return {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items()}

    def announce(layer: int) -> None:
        loader.announce(f"{stem}{layer}.")

    weights = Streamed(model.get_decoder().layers, read, announce, prefetch=prefetch)
    finalize(weights, reader.close)
    view = moe_view(model.eval(), weights)
    if view.layers:
        use_grouped(model)
    return view


def _modules(folder: Path, index: CheckpointIndex) -> tuple[PreTrainedModel, torch.dtype]:
    """The model on the meta device, made as from_pretrained makes it, and its dtype."""
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ModelError(
            "unknown_architecture",
            f"transformers knows no causal language model of type {config.model_type!r}.",
            "Use a model that AutoModelForCausalLM opens without remote code.",
        ) from error
    shard = str(folder / index.shards[0].name)
    config, dtype = _get_dtype("auto", [shard], config, None, None, True)
    config.name_or_path = str(folder)
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        model: PreTrainedModel = model_class(config)
        patch_output_recorders(model)
    return model, dtype


def _stem(model: PreTrainedModel) -> str:
    """What the name in memory of every tensor of a decoder layer starts with, up to the layer's number."""
    layers = model.get_decoder().layers
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def _refuse_missing(model: PreTrainedModel, missing: set[str]) -> None:
    """from_pretrained fills what is missing with random numbers and says so in its log; a job must not."""
    tied: dict[str, str] = model.all_tied_weights_keys
    absent = sorted(name for name in missing if name not in tied)
    # Of two tied names either may be the one on disk.
    absent = [name for name in absent if not any(of == name and by not in missing for by, of in tied.items())]
    if absent:
        raise ModelError(
            "missing_tensors",
            f"{len(absent)} tensors of the model are not in its files, the first is {absent[0]}.",
            "Download the model again, or restore the config.json that it was published with.",
        )


def _finish(model: PreTrainedModel, missing: set[str], device: torch.device) -> None:
    """What from_pretrained does after the weights: buffers that are on no disk, and tied weights."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # they come, or have come, from disk
    buffers = [name for name, _ in model.named_non_persistent_buffers()]
    for name in buffers:
        _set(model, name, torch.empty_like(model.get_buffer(name), device=device))
    model._initialize_missing_keys(is_quantized=False)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def _set(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    setattr(module, own, tensor)
