"""The hand-written header reader against the safetensors library, and against broken files."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seuf_core.checkpoint.index import INDEX, read_index
from seuf_core.errors import ModelError
from tests import tiny


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_records_are_what_the_library_reads(models, family, max_shard_size):
    folder = models(family, max_shard_size)
    index = read_index(folder)
    assert (len(index.shards) > 1) == (max_shard_size == "40KB") == (folder / INDEX).is_file()
    seen = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as library:
            for name in library.keys():  # noqa: SIM118 -- not a dict
                record, tensor = index.tensors[name], library.get_tensor(name)
                assert (record.shard, record.shape, record.elements) == (
                    shard.name,
                    tuple(tensor.shape),
                    tensor.numel(),
                )
                data = shard.read_bytes()[record.offset : record.offset + record.bytes]
                assert torch.equal(
                    torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape), tensor
                )
                seen.add(name)
    assert seen == set(index.tensors)


def test_every_dtype_of_the_library(tmp_path):
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip
    tensors = {name: torch.zeros(3, 2).to(dtype) for name, dtype in dtypes.items()}
    save_file(
        {**tensors, "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors"
    )
    records = read_index(tmp_path).tensors
    assert {name: records[name].dtype for name in dtypes} == {name: name for name in dtypes}
    assert all(records[name].bytes == 6 * tensors[name].element_size() for name in dtypes)
    assert (records["scalar"].shape, records["scalar"].elements, records["empty"].bytes) == ((), 1, 0)


def test_with_prefix_is_one_layer_in_file_order(models):
    index = read_index(models("olmoe"))
    records = index.with_prefix("model.layers.1.")
    assert {record.name for record in records} == {
        n for n in index.tensors if n.startswith("model.layers.1.")
    }
    assert records == sorted(records, key=lambda record: (record.shard, record.offset))


def _code(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_index(folder)
    return caught.value.code


def test_missing_and_cut_off_shards(own):
    folder = own("olmoe")
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    for keep in (len(data) - 1, 300, 8, 7, 0):
        shard.write_bytes(data[:keep])
        assert _code(folder) in ("incomplete_shards", "broken_shard"), keep
    shard.unlink()
    with pytest.raises(ModelError, match=f"1 of .* shards are missing.*{shard.name}") as caught:
        read_index(folder)
    assert caught.value.code == "incomplete_shards"


def test_a_shard_of_another_model_in_the_place_of_one(own):
    folder = own("olmoe")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    assert _code(folder) == "ambiguous_tensor"


def test_a_tensor_the_index_promises_and_no_shard_has(own):
    folder = own("olmoe")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.lost.weight"] = min(index["weight_map"].values())
    (folder / INDEX).write_text(json.dumps(index))
    assert _code(folder) == "incomplete_shards"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", "", 3, None])
def test_a_shard_name_cannot_leave_the_folder(own, name):
    folder = own("olmoe")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert _code(folder) == "broken_shard"


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none(own, text):
    folder = own("olmoe")
    (folder / INDEX).write_text(text)
    assert _code(folder) == "not_a_model"


def _shard(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 50) + b"{}",
        _shard(b"[]"),
        _shard(b"{"),
        _shard(b"{}"),  # eight bytes that belong to no tensor
        _shard(b'{"a": 1}'),
        _shard(b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}'),
        _shard(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}'),
        _shard(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
        _shard(b'{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}'),
        _shard(b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}'),
        _shard(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'),
        _shard(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
        ),
        _shard(b"[" * 100_000),
    ],
)
def test_a_broken_shard_names_the_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        read_index(tmp_path)
    assert caught.value.code == "broken_shard"
