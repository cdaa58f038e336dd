"""A written checkpoint is the edited model, and the base in every other byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seuf_core.checkpoint import writer
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.checkpoint.manifest import read_manifest, sha256_file, verify_files
from seuf_core.checkpoint.writer import write_checkpoint
from seuf_core.errors import ModelError, WriteError
from tests import tiny
from tests.checkpoint.edits import contents, edited, names

ONE = "model.layers.1.mlp.experts.2.down_proj.weight"  # of olmoe, [32, 16]


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_loads_as_the_edited_model(models, tmp_path, family, max_shard_size):
    model, changed = edited(family, layer=1, expert=3)
    base, out = models(family, max_shard_size), tmp_path / "out"
    before = contents(base)
    manifest = write_checkpoint(base, out, changed, "test")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    wanted, found = model.state_dict(), loaded.state_dict()
    assert set(wanted) == set(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    ids = AutoTokenizer.from_pretrained(out)("Où est-ce ?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert contents(base) == before
    assert manifest.parameters_changed == sum(tensor.numel() for tensor in changed.values())
    facts = inspect_model(out)
    assert facts.parameters == manifest.parameters_total
    assert facts.digest != manifest.base.digest == inspect_model(base).digest


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_every_byte_outside_the_changed_tensors_is_the_base_s(models, tmp_path, family, max_shard_size):
    """By an independent oracle: zero the changed ranges in both files, and compare whole files."""
    _, changed = edited(family, layer=1, expert=0)
    base, out = models(family, max_shard_size), tmp_path / "out"
    write_checkpoint(base, out, changed, "test")
    index = read_index(base)
    for shard in index.shards:
        old, new = bytearray((base / shard.name).read_bytes()), bytearray((out / shard.name).read_bytes())
        for name in changed:
            record = index.tensors[name]
            if record.shard == shard.name:
                span = slice(record.offset, record.offset + record.bytes)
                assert old[span] != new[span]
                old[span] = new[span] = bytes(record.bytes)
        assert old == new


def test_manifest_and_delta_describe_the_folder(models, tmp_path):
    _, changed = edited("mixtral", layer=2, expert=1)
    out = tmp_path / "out"
    manifest = write_checkpoint(models("mixtral"), out, changed, "seuf 1", {"seed": 3, "experts": (1, 2)})
    assert read_manifest(out) == manifest
    assert manifest.created_by == "seuf 1"
    assert manifest.extra == {"seed": 3, "experts": [1, 2]}
    assert manifest.base.model_type == "mixtral"
    found = contents(out)
    found.pop("manifest.json")
    assert found == {entry.name: entry.sha256 for entry in manifest.files}
    verify_files(out, manifest)
    index = read_index(out)
    assert {(c.tensor, c.shard, c.bytes) for c in manifest.changed} == {
        (name, index.tensors[name].shard, index.tensors[name].bytes) for name in changed
    }
    delta = load_file(out / "delta.safetensors")
    assert delta.keys() == changed.keys()
    assert all(torch.equal(delta[name], changed[name]) for name in changed)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_files_sees_damage(models, tmp_path, damage):
    out = tmp_path / "out"
    manifest = write_checkpoint(models("olmoe"), out, {ONE: torch.zeros(32, 16)}, "test")
    victim = out / manifest.files[-1].name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.unlink()
    if damage != "remove":
        victim.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(WriteError, match=victim.name) as caught:
        verify_files(out, manifest)
    assert caught.value.code == "file_differs"


def test_no_change_is_a_copy(models, tmp_path):
    manifest = write_checkpoint(models("olmoe"), tmp_path / "out", {}, "test")
    written, base = contents(tmp_path / "out"), contents(models("olmoe"))
    assert {name: written[name] for name in base} == base
    assert (manifest.changed, manifest.parameters_changed) == ((), 0)
    assert load_file(tmp_path / "out" / "delta.safetensors") == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_are_rounded_to_the_dtype_on_disk(tmp_path, dtype):
    base = tiny.write_model(tmp_path / "base", "olmoe", dtype=dtype)
    master = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).T.contiguous().T
    )  # not contiguous
    write_checkpoint(base, tmp_path / "out", {ONE: master}, "test")
    with (tmp_path / "out" / read_index(base).tensors[ONE].shard).open("rb"):
        found = load_file(tmp_path / "out" / read_index(base).tensors[ONE].shard)[ONE]
    assert found.dtype == dtype
    assert torch.equal(found, master.to(dtype))


def _refused(base: Path, out: Path, changed: dict[str, torch.Tensor]) -> WriteError:
    with pytest.raises(WriteError) as caught:
        write_checkpoint(base, out, changed, "test")
    return caught.value


def test_changes_that_do_not_fit_are_refused_before_anything_is_written(models, tmp_path):
    base, out = models("olmoe"), tmp_path / "folder" / "out"
    assert (
        _refused(base, out, {"model.layers.1.mlp.experts.down_proj": torch.zeros(1)}).code == "unknown_tensor"
    )
    assert _refused(base, out, {ONE: torch.zeros(16, 32)}).code == "wrong_shape"
    assert _refused(base, out, {ONE: torch.full((32, 16), torch.nan)}).code == "not_finite"
    assert not out.parent.exists()


def test_one_row_of_a_fused_tensor(models, tmp_path):
    """The other experts' rows stay the base's, to the byte; the delta holds the row alone."""
    base, name = models("granitemoe"), "model.layers.1.block_sparse_moe.output_linear.weight"
    rows = {f"{name}[{expert}]": torch.full((32, 16), float(expert)) for expert in (7, 0)}
    manifest = write_checkpoint(base, tmp_path / "out", rows, "test")
    shard = read_index(base).tensors[name].shard
    old, new = (load_file(folder / shard)[name] for folder in (base, tmp_path / "out"))
    assert torch.equal(new[1:7], old[1:7])
    assert new[0].eq(0).all()
    assert new[7].eq(7).all()
    assert manifest.parameters_changed == 2 * 32 * 16
    assert {change.tensor for change in manifest.changed} == set(rows)
    assert load_file(tmp_path / "out" / "delta.safetensors").keys() == set(rows)
    for wrong in (f"{name}[8]", f"{name}[-1]", f"{name}[01]", f"{name}[]", f"{name}[1][2]", "nothing[0]"):
        assert _refused(base, tmp_path / "b", {wrong: torch.zeros(32, 16)}).code == "unknown_tensor"
    assert _refused(base, tmp_path / "b", {f"{name}[1]": torch.zeros(16, 32)}).code == "wrong_shape"


@pytest.mark.parametrize("row", [0, 7])
def test_a_tensor_and_a_row_of_it_are_refused(models, tmp_path, row):
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    both = {name: torch.zeros(8, 32, 16), f"{name}[{row}]": torch.zeros(32, 16)}
    error = _refused(models("granitemoe"), tmp_path / "out", both)
    assert (error.code, name in error.message) == ("overlapping_tensors", True)


def test_a_value_too_large_for_the_dtype_on_disk_is_refused(tmp_path):
    base = tiny.write_model(tmp_path / "base", "olmoe", dtype=torch.float16)
    assert _refused(base, tmp_path / "out", {ONE: torch.full((32, 16), 7e4)}).code == "not_finite"


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_an_existing_output_is_left_alone(models, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    error = _refused(models("olmoe"), out, {ONE: torch.zeros(32, 16)})
    assert error.code == "output_exists"
    assert error.fix is not None
    assert (out / "mine").exists() == (kind == "folder")
    assert names(tmp_path) == ["out"]


def test_the_base_is_never_written_to(own, tmp_path):
    base = own("olmoe")
    before, change = contents(base), {ONE: torch.zeros(32, 16)}
    assert _refused(base, base / "out", change).code == "output_in_base"
    assert _refused(base, base, change).code == "output_in_base"
    link = tmp_path / "link"
    link.symlink_to(base)
    assert _refused(link, base / "out", change).code == "output_in_base"
    moved = base.rename(tmp_path / "m.partial")
    assert _refused(moved, tmp_path / "m", change).code == "output_in_base"
    assert contents(moved) == before


def test_a_folder_of_somebody_else_in_the_way_is_left_alone(models, tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    assert _refused(models("olmoe"), tmp_path / "out", {}).code == "output_busy"
    assert (mine / "thesis.txt").read_text() == "years"


def test_links_of_a_hub_cache_become_files(models, tmp_path):
    blobs, base = tmp_path / "blobs", tmp_path / "snapshot"
    base.mkdir()
    blobs.mkdir()
    for file in models("olmoe").iterdir():
        blob = blobs / sha256_file(file)
        blob.write_bytes(file.read_bytes())
        (base / file.name).symlink_to(blob)
    before = contents(blobs)
    out = tmp_path / "out"
    write_checkpoint(base, out, {ONE: torch.zeros(32, 16)}, "test")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert contents(blobs) == before
    (blobs / sha256_file(models("olmoe") / "tokenizer.json")).unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json") as caught:
        write_checkpoint(base, tmp_path / "other", {}, "test")
    assert caught.value.code == "incomplete_model"


def test_only_what_belongs_to_the_model_is_copied(own, tmp_path):
    base = own("olmoe")
    copied = {
        "LICENSE",
        "NOTICE.txt",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "cl100k.tiktoken",
    }
    stray = {
        "pytorch_model.bin", "training_args.bin", "model.pt", "model.pth", "data.pkl", "modeling_olmoe.py",
        "forget.json", "forget.jsonl", "consolidated.safetensors", "pytorch_model.bin.index.json",
        "README.md", ".env", "manifest.json", "delta.safetensors",
    }  # fmt: skip
    for name in copied | stray:
        (base / name).write_text("x")
    (base / "checkpoint-10").mkdir()
    model = set(names(tiny.write_model(tmp_path / "clean", "olmoe")))
    write_checkpoint(base, tmp_path / "out", {}, "test")
    assert set(names(tmp_path / "out")) == model | copied | {"manifest.json", "delta.safetensors"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["format"] == 1


def test_a_result_is_a_base_again(models, tmp_path):
    first = write_checkpoint(models("olmoe"), tmp_path / "a", {ONE: torch.zeros(32, 16)}, "test")
    second = write_checkpoint(tmp_path / "a", tmp_path / "b", {ONE: torch.ones(32, 16)}, "test")
    assert second.base.digest == inspect_model(tmp_path / "a").digest != first.base.digest
    assert load_file(tmp_path / "b" / "delta.safetensors")[ONE].eq(1).all()


def test_progress_rises_to_the_total(models, tmp_path):
    seen: list[tuple[int, int]] = []
    write_checkpoint(models("olmoe"), tmp_path / "out", {}, "test", progress=lambda *at: seen.append(at))
    done, totals = [at[0] for at in seen], {at[1] for at in seen}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert len(seen) > 10


@pytest.mark.parametrize("place", ["changed", "elsewhere", "companion", "longer"])
def test_what_does_not_read_back_is_never_published(models, tmp_path, monkeypatch, place):
    """A disk that flips one bit after the writing, in each kind of place."""
    base, out, record = models("olmoe"), tmp_path / "out", read_index(models("olmoe")).tensors[ONE]
    name = "tokenizer.json" if place == "companion" else record.shard
    real = writer.execute

    def faulty(planned, folder, done):
        real(planned, folder, done)
        data = bytearray((folder / name).read_bytes())
        at = {"changed": record.offset + 5, "elsewhere": record.offset - 1, "companion": 9, "longer": 0}[
            place
        ]
        data[at] ^= 0 if place == "longer" else 1
        (folder / name).write_bytes(data + (b"\0" if place == "longer" else b""))

    monkeypatch.setattr(writer, "execute", faulty)
    assert _refused(base, out, {ONE: torch.zeros(32, 16)}).code == "verification_failed"
    assert names(tmp_path) == []
