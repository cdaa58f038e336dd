"""Artefacts: complete under their name or not there, in a local folder and in an fsspec storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.artefacts import Artefacts
from store.ids import random_base32


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "artefacts") if request.param == "local" else f"memory://{random_base32(8)}"


@pytest.fixture
def artefacts(url: str) -> Artefacts:
    return Artefacts(url)


def make_folder(path: Path) -> Path:
    (path / "nested").mkdir(parents=True)
    (path / "manifest.json").write_bytes(b"{}")
    (path / "nested" / "shard").write_bytes(b"weights")
    return path


def read(artefacts: Artefacts, key: str) -> bytes:
    with artefacts.open_read(key) as file:
        return file.read()


def test_write_then_read(artefacts: Artefacts) -> None:
    with artefacts.open_write("files/a.jsonl") as file:
        file.write(b"one")
        assert not artefacts.exists("files/a.jsonl")
    assert read(artefacts, "files/a.jsonl") == b"one"
    with artefacts.open_read("files/a.jsonl") as file:
        file.seek(1)
        assert file.read() == b"ne"
    with artefacts.open_write("files/a.jsonl") as file:
        file.write(b"two")
    assert read(artefacts, "files/a.jsonl") == b"two"


def test_a_write_that_raises_leaves_nothing(artefacts: Artefacts, url: str) -> None:
    with pytest.raises(RuntimeError), artefacts.open_write("files/a.jsonl") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert not artefacts.exists("files/a.jsonl")
    if not url.startswith("memory:"):
        assert [path for path in Path(url).rglob("*") if path.is_file()] == []


def test_put_folder_moves_it_whole(artefacts: Artefacts, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    artefacts.put_folder(folder, "checkpoints/ckpt_1")
    assert not folder.exists()
    assert read(artefacts, "checkpoints/ckpt_1/manifest.json") == b"{}"
    assert read(artefacts, "checkpoints/ckpt_1/nested/shard") == b"weights"


def test_put_folder_on_one_disk_copies_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    inode = (folder / "nested" / "shard").stat().st_ino
    artefacts = Artefacts(str(tmp_path / "artefacts"))
    artefacts.put_folder(folder, "checkpoints/ckpt_1")
    assert (artefacts.path("checkpoints/ckpt_1") / "nested" / "shard").stat().st_ino == inode


def test_put_folder_that_fails_leaves_nothing(artefacts: Artefacts, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artefacts.put_folder(tmp_path / "nowhere", "checkpoints/ckpt_1")
    assert not artefacts.exists("checkpoints/ckpt_1")


def test_delete(artefacts: Artefacts, tmp_path: Path) -> None:
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_1")
    with artefacts.open_write("files/a.jsonl") as file:
        file.write(b"one")
    artefacts.delete("checkpoints/ckpt_1")
    artefacts.delete("files/a.jsonl")
    artefacts.delete("files/a.jsonl")
    assert not artefacts.exists("checkpoints/ckpt_1/manifest.json")
    assert not artefacts.exists("files/a.jsonl")
    with pytest.raises(FileNotFoundError):
        artefacts.open_read("files/a.jsonl")


@pytest.mark.parametrize("key", ["", "../x", "/etc/passwd", "files/../../x", ".drafts/x", "files/.x", "a\\b"])
def test_keys_that_leave_the_folder_are_refused(artefacts: Artefacts, key: str) -> None:
    with pytest.raises(ValueError, match="artefact key"):
        artefacts.open_read(key)


def test_path_is_for_local_folders(tmp_path: Path) -> None:
    local = Artefacts(str(tmp_path / "artefacts"))
    assert local.path("files/a.jsonl") == tmp_path / "artefacts" / "files" / "a.jsonl"
    with pytest.raises(ValueError, match="SEUF_ARTEFACTS_URL"):
        Artefacts("memory://x").path("files/a.jsonl")
