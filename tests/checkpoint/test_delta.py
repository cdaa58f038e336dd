"""Base and delta give the checkpoint back, every file to the last byte; anything else is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seuf_core.checkpoint.copying import Share
from seuf_core.checkpoint.delta import apply_delta
from seuf_core.checkpoint.delta_file import DeltaFacts, write_delta
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.manifest import read_manifest
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.errors import WriteError
from tests import tiny
from tests.checkpoint.edits import contents, edited

LISTED = json.dumps({"base": "x", "created_by": "x", "extra": {}, "files": ["a"]})  # no digests in it


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_rebuilds_the_same_folder(models, tmp_path, family, max_shard_size):
    base, changed = models(family, max_shard_size), edited(family, layer=1, expert=2)[1]
    written = write_checkpoint(base, tmp_path / "a", changed, "seuf 1", {"seed": 1}, share="hardlink")
    assert apply_delta(base, tmp_path / "a" / "delta.safetensors", tmp_path / "b") == written
    assert contents(tmp_path / "b") == contents(tmp_path / "a") != contents(base)


def test_of_a_bfloat16_model_from_float32_masters(tmp_path):
    base = tiny.write_model(tmp_path / "base", "olmoe", dtype=torch.bfloat16)
    write_checkpoint(base, tmp_path / "a", edited("olmoe", layer=0, expert=1)[1], "test")
    apply_delta(base, tmp_path / "a" / "delta.safetensors", tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.fixture
def delta(models, tmp_path) -> Path:
    changed = edited("olmoe", layer=1, expert=2)[1]
    write_checkpoint(models("olmoe"), tmp_path / "a", changed, "test")
    return tmp_path / "a" / "delta.safetensors"


def test_data_of_the_delta_start_on_a_multiple_of_eight(delta):
    """As the format asks, so that it can be mapped; whatever the length of the header."""
    assert int.from_bytes(delta.read_bytes()[:8], "little") % 8 == 0
    facts = DeltaFacts("", "", {}, {})
    for length in range(8):
        write_delta(delta, [], [], replace(facts, created_by="x" * length))
        assert int.from_bytes(delta.read_bytes()[:8], "little") % 8 == 0
        assert load_file(delta) == {}


def _refused(base: Path, delta: Path, out: Path, share: Share = "reflink") -> str:
    with pytest.raises(WriteError) as caught:
        apply_delta(base, delta, out, share=share)
    assert not out.exists()
    assert not os.path.lexists(out.with_name(out.name + ".partial"))
    return caught.value.code


def test_another_base_is_refused(delta, tmp_path):
    other = tiny.write_model(tmp_path / "other", "olmoe", seed=5)
    assert _refused(other, delta, tmp_path / "b") == "wrong_base"


def test_a_base_that_differs_where_the_digest_does_not_look(own, delta, tmp_path):
    """One bit of a patched shard, outside the digest's samples: the shard's own digest finds it."""
    base = own("olmoe")
    shard = _patched_shards(delta)[0]
    names = {record for record in load_file(base / shard) if "experts" in record} - load_file(delta).keys()
    tensors = load_file(base / shard)
    tensor = tensors[min(names)].view(-1).view(torch.uint8)
    assert tensor.numel() > 512 + 256
    tensor[300] ^= 1  # samples are bytes 0 to 255 and 256 from the middle on
    save_file(tensors, base / shard, metadata={"format": "pt"})
    assert _refused(base, delta, tmp_path / "b") == "verification_failed"


@pytest.mark.parametrize("share", ["reflink", "hardlink"])
@pytest.mark.parametrize("which", ["clean shard", "tokenizer.json"])
def test_a_base_that_differs_in_a_file_that_is_not_patched(own, models, delta, tmp_path, which, share):
    """Read, not remembered: the file is changed in place and has its old time again."""
    base = own("olmoe")
    clean = next(shard.name for shard in read_index(base).shards if shard.name not in _patched_shards(delta))
    file = base / (clean if which == "clean shard" else which)
    os.utime(file, (1, 1))
    write_checkpoint(base, tmp_path / "first", {}, "test", share="hardlink")  # its digests are remembered now
    with file.open("r+b") as stream:  # the same inode, with its last byte turned round
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, (1, 1))
    assert _refused(base, delta, tmp_path / "b", share) == "verification_failed"


def test_what_the_base_got_later_is_left_out_and_what_it_lost_is_named(own, delta, tmp_path):
    base = own("olmoe")
    (base / "chat_template.jinja").write_text("{{ x }}")
    apply_delta(base, delta, tmp_path / "b", share="hardlink")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    (base / "tokenizer.json").unlink()
    with pytest.raises(WriteError, match=r"has no tokenizer\.json") as caught:
        apply_delta(base, delta, tmp_path / "c")
    assert caught.value.code == "wrong_base"


def test_a_changed_delta_is_refused(models, delta, tmp_path):
    tensors, facts = load_file(delta), _facts(delta)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, tmp_path / "d.safetensors", metadata={"seuf": facts})
    assert _refused(models("olmoe"), tmp_path / "d.safetensors", tmp_path / "b") == "verification_failed"


@pytest.mark.parametrize(
    "metadata", [None, {"seuf": "{"}, {"seuf": '{"base": "x"}'}, {"seuf": "[]"}, {"seuf": LISTED}]
)
def test_a_file_that_is_no_delta(models, tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "d.safetensors", metadata=metadata)
    assert _refused(models("olmoe"), tmp_path / "d.safetensors", tmp_path / "b") == "not_a_delta"
    assert _refused(models("olmoe"), tmp_path / "missing", tmp_path / "b") == "not_a_delta"


def _patched_shards(delta: Path) -> list[str]:
    manifest = read_manifest(delta.parent)
    return sorted({change.shard for change in manifest.changed})


def _facts(delta: Path) -> str:
    with safe_open(delta, "pt") as library:
        return library.metadata()["seuf"]
