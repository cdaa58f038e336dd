"""Files that share their bytes with the base's: on this file system, across two, and with reflinks where they exist."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seuf_core.checkpoint import copying
from seuf_core.checkpoint.copying import share_file
from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.manifest import verify_files
from seuf_core.checkpoint.writer import write_checkpoint
from tests.checkpoint.edits import contents

ONE = "model.layers.1.mlp.experts.2.down_proj.weight"  # of olmoe, [32, 16]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 64)
    return tmp_path / "a"


def test_a_hard_link_is_of_the_file_behind_a_symbolic_link(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert share_file(tmp_path / "link", tmp_path / "b", "hardlink") in ("hardlink", "reflink")
    assert not (tmp_path / "b").is_symlink()
    assert (tmp_path / "b").read_bytes() == file.read_bytes()


def test_a_copy_is_left_to_the_caller(file, tmp_path):
    assert share_file(file, tmp_path / "b", "copy") == "copy"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_the_kernel_refuses_a_link_there_is_a_copy(file, tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(copying.os, "link", refuse)
    monkeypatch.setattr(copying.fcntl, "ioctl", refuse)
    assert share_file(file, tmp_path / "b", "hardlink") == "copy"
    assert not (tmp_path / "b").exists()


def test_any_other_error_is_an_error(file, tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(FileExistsError):
        share_file(file, tmp_path / "b", "hardlink")
    assert (tmp_path / "b").read_text() == "mine"


def test_a_copy_is_never_written_into_a_file_that_is_there(file, tmp_path):
    os.link(file, tmp_path / "b")
    with pytest.raises(FileExistsError):
        copying.copy_patched(file, tmp_path / "b", [], torch.zeros, lambda _: None)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_across_two_file_systems_everything_is_copied(models, tmp_path):
    base, out = models("olmoe"), Path("/dev/shm") / f"seuf-test-{os.getpid()}"
    assert base.stat().st_dev != out.parent.stat().st_dev
    try:
        manifest = write_checkpoint(base, out, {ONE: torch.zeros(32, 16)}, "test", share="hardlink")
        verify_files(out, manifest)
        assert all(path.stat().st_nlink == 1 for path in out.iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def btrfs(tmp_path):
    """A file system with reflinks, in a file: only root may mount one, and only where the kernel can."""
    image, folder = tmp_path / "image", tmp_path / "btrfs"
    folder.mkdir()
    with image.open("wb") as stream:
        stream.truncate(256 << 20)
    for command in (["mkfs.btrfs", "-q", image], ["mount", "-o", "loop", image, folder]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a btrfs file system cannot be made and mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_reflinks_share_blocks_until_one_side_is_changed(models, tmp_path, btrfs):
    base = Path(shutil.copytree(models("olmoe"), btrfs / "base"))
    before, change = contents(base), {ONE: torch.zeros(32, 16)}
    manifest = write_checkpoint(base, btrfs / "out", change, "test")
    verify_files(btrfs / "out", manifest)
    write_checkpoint(models("olmoe"), tmp_path / "plain", change, "test", share="copy")
    assert contents(btrfs / "out") == contents(tmp_path / "plain")
    for shard in read_index(base).shards:
        assert share_file(base / shard.name, btrfs / "again", "hardlink") == "reflink"
        (btrfs / "again").unlink()
        with (btrfs / "out" / shard.name).open("r+b") as stream:
            stream.write(b"\0" * 100)
    assert contents(base) == before


def test_of_a_reflinked_shard_only_the_changed_tensors_take_space(tmp_path, btrfs):
    base = btrfs / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({name: torch.rand(2 << 20) for name in "abcd"}, base / "model.safetensors")  # 8 MiB each
    free = _free(btrfs)
    value = torch.rand(2 << 20)
    write_checkpoint(base, btrfs / "out", {"b": value}, "test")
    taken = free - _free(btrfs)
    assert 16 << 20 <= taken < 20 << 20  # the tensor in its shard and in the delta
    assert torch.equal(load_file(btrfs / "out" / "model.safetensors")["b"], value)


def _free(folder: Path) -> int:
    subprocess.run(["sync", "-f", folder], check=True)
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize
