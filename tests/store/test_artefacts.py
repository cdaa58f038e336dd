"""Artefacts: complete under their name or not there, in a local folder and in a real S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from store.artefacts import Artefacts
from store.bucket import PART_BYTES
from store.errors import StorageAway
from store.ids import random_base32
from tests.services import free_port, s3_on, wait_until


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "artefacts")
    found: str = request.getfixturevalue("s3_bucket")
    return found


@pytest.fixture
def artefacts(url: str) -> Artefacts:
    return Artefacts(url, os.environ.get("SEUF_S3_ENDPOINT_URL", ""))


def make_folder(path: Path) -> Path:
    (path / "nested").mkdir(parents=True)
    (path / "manifest.json").write_bytes(b"{}")
    (path / "nested" / "shard").write_bytes(b"weights")
    return path


def read(artefacts: Artefacts, key: str) -> bytes:
    with artefacts.open_read(key) as file:
        return file.read()


def write(artefacts: Artefacts, key: str, content: bytes) -> None:
    with artefacts.open_write(key) as file:
        file.write(content)


def test_write_then_read(artefacts: Artefacts) -> None:
    with artefacts.open_write("files/a.jsonl") as file:
        file.write(b"one")
        assert not artefacts.exists("files/a.jsonl")
    assert read(artefacts, "files/a.jsonl") == b"one"
    with artefacts.open_read("files/a.jsonl") as file:
        file.seek(1)
        assert file.read() == b"ne"
    write(artefacts, "files/a.jsonl", b"two")
    assert read(artefacts, "files/a.jsonl") == b"two"
    write(artefacts, "files/empty", b"")
    assert read(artefacts, "files/empty") == b""


@pytest.mark.parametrize("size", [4, PART_BYTES + 5])
def test_a_write_that_raises_leaves_nothing(artefacts: Artefacts, url: str, size: int) -> None:
    write(artefacts, "files/kept", b"before")
    for key in ("files/a.jsonl", "files/kept"):
        with pytest.raises(RuntimeError), artefacts.open_write(key) as file:  # noqa: PT012
            file.write(b"h" * size)
            raise RuntimeError
    assert not artefacts.exists("files/a.jsonl")
    assert read(artefacts, "files/kept") == b"before"
    assert [stored.key for stored in artefacts.list("files")] == ["files/kept"]
    assert artefacts.sweep_drafts(0) == 0


def test_a_writer_that_was_killed_is_swept(artefacts: Artefacts, url: str) -> None:
    program = f"""if True:
        import os, sys, time
        from store.artefacts import Artefacts
        with Artefacts({url!r}, {os.environ.get("SEUF_S3_ENDPOINT_URL", "")!r}).open_write("files/half") as file:
            file.write(b"h" * {PART_BYTES + 5})
            file.flush()
            print("written", flush=True)
            time.sleep(60)
    """
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert artefacts.list("files") == []
    if not url.startswith("s3:"):  # this S3 server says that every upload began years ago
        assert artefacts.sweep_drafts(3600) == 0
    assert artefacts.sweep_drafts(0) == 1
    assert artefacts.sweep_drafts(0) == 0


def test_put_folder_moves_it_whole(artefacts: Artefacts, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    big = os.urandom(2 * PART_BYTES + 3)
    (folder / "big").write_bytes(big)
    artefacts.put_folder(folder, "checkpoints/ckpt_1")
    assert not folder.exists()
    assert artefacts.exists("checkpoints/ckpt_1")
    assert read(artefacts, "checkpoints/ckpt_1/manifest.json") == b"{}"
    assert read(artefacts, "checkpoints/ckpt_1/nested/shard") == b"weights"
    assert read(artefacts, "checkpoints/ckpt_1/big") == big


def test_put_folder_on_one_disk_copies_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    inode = (folder / "nested" / "shard").stat().st_ino
    artefacts = Artefacts(str(tmp_path / "artefacts"))
    artefacts.put_folder(folder, "checkpoints/ckpt_1")
    assert (artefacts.path("checkpoints/ckpt_1") / "nested" / "shard").stat().st_ino == inode


def test_put_folder_on_another_disk_is_a_copy(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"seuf-{random_base32(8)}"
    folder = make_folder(other / "out")
    try:
        assert folder.stat().st_dev != tmp_path.stat().st_dev
        artefacts = Artefacts(str(tmp_path / "artefacts"))
        artefacts.put_folder(folder, "checkpoints/ckpt_1")
        assert not folder.exists()
        assert read(artefacts, "checkpoints/ckpt_1/nested/shard") == b"weights"
        assert artefacts.sweep_drafts(0) == 0
    finally:
        subprocess.run(["rm", "-rf", str(other)], check=True)


def test_put_folder_that_fails_leaves_nothing(artefacts: Artefacts, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artefacts.put_folder(tmp_path / "nowhere", "checkpoints/ckpt_1")
    assert not artefacts.exists("checkpoints/ckpt_1")


def test_fetch_gives_a_local_file(artefacts: Artefacts, tmp_path: Path) -> None:
    content = os.urandom(PART_BYTES + 1)
    write(artefacts, "files/a.jsonl", content)
    target = tmp_path / "work" / "sets" / "forget.jsonl"
    for _ in range(2):  # what an earlier try left is replaced
        artefacts.fetch("files/a.jsonl", target)
        assert target.read_bytes() == content
    artefacts.delete("files/a.jsonl")
    assert target.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        artefacts.fetch("files/none", target)


def test_list_says_what_is_there_and_how_old_it_is(artefacts: Artefacts, tmp_path: Path) -> None:
    assert artefacts.list("checkpoints") == []
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_1")
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_10")
    write(artefacts, "files/a", b"a")
    found = artefacts.list("checkpoints")
    assert [stored.key for stored in found] == ["checkpoints/ckpt_1", "checkpoints/ckpt_10"]
    assert all(0 <= stored.age_seconds < 60 for stored in found)


def test_the_age_of_a_folder_is_that_of_its_newest_file(tmp_path: Path) -> None:
    artefacts = Artefacts(str(tmp_path / "artefacts"))
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_1")
    folder, hour_ago = artefacts.path("checkpoints/ckpt_1"), time.time() - 3600
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (hour_ago, hour_ago))
    assert artefacts.list("checkpoints")[0].age_seconds == pytest.approx(3600, abs=30)
    os.utime(folder / "nested" / "shard")
    assert artefacts.list("checkpoints")[0].age_seconds < 30


def test_delete(artefacts: Artefacts, tmp_path: Path) -> None:
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_1")
    artefacts.put_folder(make_folder(tmp_path / "out"), "checkpoints/ckpt_10")
    write(artefacts, "files/a.jsonl", b"one")
    artefacts.delete("checkpoints/ckpt_1")
    artefacts.delete("files/a.jsonl")
    artefacts.delete("files/a.jsonl")
    assert not artefacts.exists("checkpoints/ckpt_1/manifest.json")
    assert not artefacts.exists("files/a.jsonl")
    assert read(artefacts, "checkpoints/ckpt_10/manifest.json") == b"{}"
    with pytest.raises(FileNotFoundError):
        read(artefacts, "files/a.jsonl")


@pytest.mark.parametrize(
    "key", ["", "../x", "/etc/passwd", "files/../../x", ".drafts/x", "files/.x", "a\\b", "a\0"]
)
def test_keys_that_leave_the_folder_are_refused(artefacts: Artefacts, key: str, tmp_path: Path) -> None:
    acts = (
        lambda: read(artefacts, key),
        lambda: write(artefacts, key, b""),
        lambda: artefacts.fetch(key, tmp_path / "target"),
        lambda: artefacts.delete(key),
        lambda: artefacts.list(key),
        lambda: artefacts.put_folder(tmp_path, key),
        lambda: artefacts.signed_url(key, 1, {}),
    )
    for act in acts:
        with pytest.raises(ValueError, match="artefact key"):
            act()


def test_path_is_for_local_folders(tmp_path: Path, s3_bucket: str) -> None:
    local = Artefacts(str(tmp_path / "artefacts"))
    assert local.path("files/a.jsonl") == tmp_path / "artefacts" / "files" / "a.jsonl"
    assert local.signed_url("files/a.jsonl", 60, {}) is None
    with pytest.raises(ValueError, match="fetch"):
        Artefacts(s3_bucket).path("files/a.jsonl")


def test_a_full_or_broken_disk_is_a_storage_that_is_away(tmp_path: Path) -> None:
    artefacts = Artefacts(str(tmp_path / "artefacts"))
    (tmp_path / "artefacts" / "files").write_text("not a folder")
    with pytest.raises(StorageAway) as away:
        write(artefacts, "files/a", b"a")
    assert isinstance(away.value.__cause__, OSError)
    assert artefacts.sweep_drafts(0) == 0


def test_a_server_that_is_away_comes_back(s3_bucket: str, tmp_path: Path) -> None:
    port = free_port()
    artefacts = Artefacts(s3_bucket, f"http://127.0.0.1:{port}")
    folder = make_folder(tmp_path / "out")
    with pytest.raises(StorageAway):
        artefacts.put_folder(folder, "checkpoints/ckpt_1")
    assert (folder / "nested" / "shard").read_bytes() == b"weights"
    with s3_on(port):
        for act in (lambda: read(artefacts, "files/a"), lambda: write(artefacts, "files/a", b"a")):
            with pytest.raises(StorageAway):  # the bucket is missing, which says nothing about the file
                act()
        wait_until(lambda: made_bucket(s3_bucket, port), 10, "the bucket")
        artefacts.put_folder(folder, "checkpoints/ckpt_1")
        assert read(artefacts, "checkpoints/ckpt_1/nested/shard") == b"weights"
        with pytest.raises(FileNotFoundError):
            read(artefacts, "files/a")


def made_bucket(url: str, port: int) -> bool:
    import httpx

    name = url.removeprefix("s3://").partition("/")[0]
    return httpx.put(f"http://127.0.0.1:{port}/{name}").status_code == 200


def test_credentials_that_are_refused_are_no_lost_file(
    s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageAway):
        read(Artefacts(s3_bucket, s3_server), "files/a")
