"""A written checkpoint is the edited model, and the base in every other byte."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seuf_core.checkpoint import copying, delta_file, staging
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


@pytest.mark.parametrize("share", ["reflink", "hardlink"])
def test_links_of_a_hub_cache_become_files(models, tmp_path, share):
    blobs, base = tmp_path / "blobs", tmp_path / "snapshot"
    base.mkdir()
    blobs.mkdir()
    for file in models("olmoe").iterdir():
        blob = blobs / sha256_file(file)
        blob.write_bytes(file.read_bytes())
        (base / file.name).symlink_to(blob)
    before = contents(blobs)
    out = tmp_path / "out"
    write_checkpoint(base, out, {ONE: torch.zeros(32, 16)}, "test", share=share)
    assert not any(path.is_symlink() for path in out.iterdir())
    verify_files(out, read_manifest(out))
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
    """A disk that flips one bit of what was just written, or writes too much, in each kind of place."""
    base, out, record = models("olmoe"), tmp_path / "out", read_index(models("olmoe")).tensors[ONE]
    name = "tokenizer.json" if place == "companion" else record.shard
    at = {"changed": record.offset + 5, "elsewhere": record.offset - 1, "companion": 9, "longer": 0}[place]
    size, real = (base / name).stat().st_size, copying.write_all

    def faulty(file: int, data: memoryview, offset: int) -> None:
        real(file, data, offset)
        if Path(f"/proc/self/fd/{file}").resolve().name == name:
            if place == "longer":
                os.pwrite(file, b"\0", size)
            elif offset <= at < offset + len(data):
                os.pwrite(file, bytes([data[at - offset] ^ 1]), at)

    monkeypatch.setattr(copying, "write_all", faulty)
    assert _refused(base, out, {ONE: torch.zeros(32, 16)}).code == "verification_failed"
    assert names(tmp_path) == []


def test_a_delta_that_does_not_read_back_is_never_published(models, tmp_path, monkeypatch):
    real = delta_file.sync

    def faulty(path: Path) -> None:
        with path.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\xff")
        real(path)

    monkeypatch.setattr(delta_file, "sync", faulty)
    error = _refused(models("olmoe"), tmp_path / "out", {ONE: torch.zeros(32, 16)})
    assert (error.code, "delta.safetensors" in error.message) == ("verification_failed", True)


@pytest.mark.parametrize("share", ["reflink", "hardlink", "copy"])
def test_what_may_be_shared_and_what_never(own, tmp_path, share):
    """Shards that change and files that a person edits are files of their own, whatever may be shared."""
    base, out = own("olmoe"), tmp_path / "out"
    before, modes = contents(base), {path.name: path.stat().st_mode for path in base.iterdir()}
    write_checkpoint(base, out, {ONE: torch.zeros(32, 16)}, "test", share=share)
    dirty = read_index(base).tensors[ONE].shard
    linked = {name for name in names(base) if (out / name).samefile(base / name)}
    clean = {shard.name for shard in read_index(base).shards} - {dirty}
    assert linked == (clean if share == "hardlink" else set())
    plain = tmp_path / "plain"
    write_checkpoint(base, plain, {ONE: torch.zeros(32, 16)}, "test", share="copy")
    assert contents(out) == contents(plain)
    # Neither another checkpoint made of this one, nor its end, reaches the base.
    write_checkpoint(out, tmp_path / "next", {ONE: torch.ones(32, 16)}, "test", share=share)
    shutil.rmtree(out)
    assert contents(base) == before
    assert {path.name: path.stat().st_mode for path in base.iterdir()} == modes


def test_a_shared_file_that_is_changed_later_is_seen(own, tmp_path):
    """What a hard link costs, and that the manifest tells."""
    base, out = own("olmoe"), tmp_path / "out"
    manifest = write_checkpoint(base, out, {ONE: torch.zeros(32, 16)}, "test", share="hardlink")
    shard = next(
        shard.name for shard in read_index(base).shards if (out / shard.name).samefile(base / shard.name)
    )
    with (base / shard).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    with pytest.raises(WriteError, match=shard):
        verify_files(out, manifest)


def test_saving_over_a_base_or_a_checkpoint_with_the_library_parts_them(own, tmp_path):
    """The library replaces files and does not write into them, so the other folder keeps its own."""
    base, out = own("olmoe"), tmp_path / "out"
    write_checkpoint(base, out, {}, "test", share="hardlink")
    before = contents(base)
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.nn.init.ones_(model.lm_head.weight)
    model.save_pretrained(out, max_shard_size="40KB")
    assert contents(base) == before


def _needs(base: Path, changed: dict[str, torch.Tensor]) -> int:
    """Bytes of the files that a checkpoint with hard links cannot share, delta and manifest excepted."""
    index = read_index(base)
    clean = {shard.name for shard in index.shards} - {index.tensors[name].shard for name in changed}
    return sum(path.stat().st_size for path in base.iterdir() if path.name not in clean)


def test_only_what_is_written_must_fit(models, tmp_path, monkeypatch):
    base, changed = models("olmoe"), {ONE: torch.zeros(32, 16)}
    whole = sum(path.stat().st_size for path in base.iterdir())
    free = _needs(base, changed) + 10_000
    assert free < whole
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert _refused(base, tmp_path / "out", changed).code == "disk_full"
    write_checkpoint(base, tmp_path / "out", changed, "test", share="hardlink")


def test_with_links_only_dirty_shards_and_small_files_are_written(models, tmp_path):
    base, changed = models("olmoe"), {ONE: torch.zeros(32, 16)}
    write_checkpoint(base, tmp_path / "warm", changed, "test", share="hardlink")
    before = _written()
    write_checkpoint(base, tmp_path / "out", changed, "test", share="hardlink")
    new = sum((tmp_path / "out" / name).stat().st_size for name in ("delta.safetensors", "manifest.json"))
    assert 0 <= _written() - before - _needs(base, changed) - new < 1000  # the cache, and what counts it


def _written() -> int:
    """Bytes that this process has given to write(), so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def test_what_is_shared_is_read_for_its_digest_once(own, tmp_path):
    """The second checkpoint of a base has only what it writes to do; so has one made from the first."""
    base, changed = own("olmoe"), {ONE: torch.zeros(32, 16)}
    for path in base.iterdir():
        os.utime(path, (1, 1))
    whole, totals, last = sum(path.stat().st_size for path in base.iterdir()), [], [0]
    for name, of in (("a", base), ("b", base), ("c", tmp_path / "a")):

        def progress(_: int, total: int) -> None:
            last[0] = total

        write_checkpoint(of, tmp_path / name, changed, "test", progress=progress, share="hardlink")
        totals.append(last[0])
    assert totals == [whole, _needs(base, changed), _needs(base, changed)]
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_copy_with_a_remembered_digest_is_compared_with_the_base_all_the_same(own, tmp_path, monkeypatch):
    base, real = own("olmoe"), copying.write_all
    for path in base.iterdir():
        os.utime(path, (1, 1))
    manifest = write_checkpoint(base, tmp_path / "a", {}, "test", share="copy")
    hashed: list[int] = []
    update = copying.BackgroundDigest.update
    monkeypatch.setattr(
        copying.BackgroundDigest,
        "update",
        lambda self, piece: (hashed.append(len(piece)), update(self, piece)),
    )
    assert write_checkpoint(base, tmp_path / "b", {}, "test", share="copy") == manifest
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    shards = sum(shard.size for shard in read_index(base).shards)
    assert sum(hashed) == sum(path.stat().st_size for path in base.iterdir()) - shards

    def faulty(file: int, data: memoryview, offset: int) -> None:
        real(file, bytes([data[0] ^ 1, *data[1:]]), offset)

    monkeypatch.setattr(copying, "write_all", faulty)
    assert _refused(base, tmp_path / "c", {}).code == "verification_failed"


def test_everything_is_on_the_disk_before_the_folder_has_its_name(models, tmp_path, monkeypatch):
    """Files, and the folder that lists them; a power cut after the rename then leaves a whole checkpoint."""
    synced, missing = set(), []
    fsync, rename = os.fsync, Path.rename

    def recorded(file: int) -> None:
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def renaming(self: Path, target: Path) -> Path:
        missing.extend(path.name for path in (*self.iterdir(), self) if path.stat().st_ino not in synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", renaming)
    write_checkpoint(models("olmoe"), tmp_path / "out", {ONE: torch.zeros(32, 16)}, "test", share="hardlink")
    assert missing == [staging.MARKER]


def test_memory_is_a_few_pieces_whatever_the_size(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    large = {name: torch.zeros(4 << 20, dtype=torch.bfloat16) for name in "abcd"}  # 8 MiB each
    save_file(large, base / "model.safetensors")
    changed = {"b": torch.ones(4 << 20, dtype=torch.bfloat16)}
    tracemalloc.start()
    try:
        write_checkpoint(base, tmp_path / "out", changed, "test")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].eq(1).all()
