"""A digest is remembered for a file as long as it is that file, and never for one that may still change."""

import hashlib
import os

import pytest

from seuf_core.checkpoint.digests import BackgroundDigest, remember, remembered, sha256_of


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("SEUF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"one")
    os.utime(tmp_path / "a", (1, 1))
    remember(tmp_path / "a", (tmp_path / "a").stat(), "0" * 64)
    return tmp_path / "a"


def test_by_any_name_of_the_file(file, tmp_path):
    os.link(file, tmp_path / "b")
    file.rename(tmp_path / "c")
    assert remembered(tmp_path / "b") == remembered(tmp_path / "c") == "0" * 64


def test_another_time_size_or_file_is_another_digest(file, tmp_path):
    (tmp_path / "b").write_bytes(b"one")
    os.utime(tmp_path / "b", (1, 1))
    assert remembered(tmp_path / "b") is None
    file.write_bytes(b"two")
    assert remembered(file) is None
    os.utime(file, (1, 1))
    assert remembered(file) == "0" * 64  # as documented: who sets the time back is not seen
    file.write_bytes(b"three")
    os.utime(file, (1, 1))
    assert remembered(file) is None


def test_what_is_young_or_changed_while_it_was_read_is_not_remembered(file, tmp_path):
    young = tmp_path / "young"
    young.write_bytes(b"x")
    remember(young, young.stat(), "1" * 64)
    assert remembered(young) is None
    before = file.stat()
    file.write_bytes(b"other")
    os.utime(file, (2, 2))
    remember(file, before, "1" * 64)
    assert remembered(file) is None


def test_a_cache_that_cannot_be_written_or_is_broken_is_none(file, monkeypatch):
    (place,) = (file.parent / "cache" / "sha256").iterdir()
    place.write_text("cut o")
    assert remembered(file) is None
    monkeypatch.setenv("SEUF_CACHE", os.devnull)
    remember(file, file.stat(), "0" * 64)
    assert remembered(file) is None


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_digests_are_hashlib_s(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    told: list[int] = []
    assert sha256_of(tmp_path / "a", told.append) == hashlib.sha256(data).hexdigest()
    assert sum(told) == size
    with BackgroundDigest() as digest:
        for at in range(0, size, 1000):
            digest.update(data[at : at + 1000])
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
