"""Tiny models on disk, written once a session: tests that change a folder copy it first."""

import shutil
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models("olmoe") or models("olmoe", max_shard_size="1GB"): a folder to read, never to change."""
    written: dict[tuple[str, str], Path] = {}
    root = tmp_path_factory.mktemp("models")

    def get(family: str, max_shard_size: str = "40KB") -> Path:
        key = (family, max_shard_size)
        if key not in written:
            folder = root / f"{family}-{max_shard_size}"
            written[key] = tiny.write_model(folder, family, max_shard_size=max_shard_size)
        return written[key]

    return get


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Digests are remembered in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEUF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own(models, tmp_path):
    """own("olmoe"): a copy this test may break."""

    def copy(family: str, max_shard_size: str = "40KB") -> Path:
        return Path(shutil.copytree(models(family, max_shard_size), tmp_path / f"own-{family}"))

    return copy
