"""Tensors as the library reads them; and exactly their bytes, counted at the system call."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seuf_core.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from seuf_core.errors import ModelError
from tests import tiny
from tests.checkpoint.edits import names


@pytest.fixture
def bytes_read(monkeypatch):
    """Sizes of every read through os.preadv, the only way this reader touches weights."""
    sizes: list[int] = []
    real = os.preadv

    def counting(file, buffers, offset):
        sizes.append(real(file, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_layers_are_those_of_the_whole_model(models, family):
    library = {n: t for shard in models(family).glob("*.safetensors") for n, t in load_file(shard).items()}
    with CheckpointReader(models(family)) as reader:
        layers = [reader.layer(i) for i in range(4 if family == "deepseek_v2" else 3)]
    assert sum(map(len, layers)) == sum(name.startswith("model.layers.") for name in library)
    for part in layers:
        assert all(torch.equal(tensor, library[name]) for name, tensor in part.items())
    assert all(name.startswith("model.layers.1.") for name in layers[1])


@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_a_layer_costs_its_own_bytes_and_no_more(models, bytes_read, max_shard_size):
    with CheckpointReader(models("qwen2_moe", max_shard_size)) as reader:
        assert bytes_read == []  # headers are read by other means; no weight was touched
        layer = reader.layer(1)
    assert sum(bytes_read) == sum(tensor.numel() * tensor.element_size() for tensor in layer.values())
    assert len(bytes_read) == len(layer)


def test_memory_of_one_tensor_of_a_large_file(tmp_path):
    """A 32 MiB tensor of a 128 MiB file: the process grows by 32 MiB and a little, at its highest."""
    size = 32 << 20
    save_file(
        {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(4)}, tmp_path / "model.safetensors"
    )
    child = os.fork()
    if child == 0:
        try:
            with CheckpointReader(tmp_path) as reader:
                held = int(_anonymous())
                resource.setrlimit(resource.RLIMIT_DATA, (held + size + (8 << 20),) * 2)
                tensor = reader.tensor("t2")
                os._exit(0 if int(tensor[0]) == 2 and int(tensor[-1]) == 2 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def _anonymous() -> int:
    """Bytes that count against RLIMIT_DATA: private writable mappings."""
    with Path("/proc/self/status").open() as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmData"].split()[0]) * 1024


def test_every_dtype(tmp_path):
    tensors = {name: torch.tensor([0.0, 1.0, 1.0]).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            read = reader.tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_an_unknown_name_and_a_file_cut_off_later(own):
    folder = own("olmoe")
    with CheckpointReader(folder) as reader:
        with pytest.raises(ModelError, match="no_such") as caught:
            reader.tensor("no_such")
        assert caught.value.code == "unknown_tensor"
        record = reader.index.with_prefix("model.layers.2.")[-1]
        os.truncate(folder / record.shard, record.offset + record.bytes // 2)
        with pytest.raises(ModelError) as caught:
            reader.tensor(record.name)
        assert caught.value.code == "incomplete_shards"


def test_close_gives_every_descriptor_back(models):
    before = len(names(Path("/proc/self/fd")))
    with CheckpointReader(models("olmoe")) as reader:
        for layer in range(3):
            reader.layer(layer)
        assert len(names(Path("/proc/self/fd"))) > before
    assert len(names(Path("/proc/self/fd"))) == before
