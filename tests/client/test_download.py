"""Downloads: byte for byte, resumed where they broke, and never half a checkpoint under its name."""

import hashlib
import random
from pathlib import Path

import pytest

from client import Client, DownloadError
from client.download import _inside, download
from tests.cutting import cutting
from tests.serving import finish

SIZE = 2_500_000
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def content():
    return {WEIGHTS: random.Random(2).randbytes(SIZE), "config.json": b"{}", "empty.txt": b""}


@pytest.fixture
def made(tenant, tiny_model, tmp_path, content):
    """Id of a finished checkpoint."""
    return finish(tenant.served, tenant.run(tenant.submit(tiny_model)["id"]), tmp_path / "made", content)


def whole(folder: Path, content: dict[str, bytes]) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names == {*content, "manifest.json"} and all(
        (folder / name).read_bytes() == data for name, data in content.items()
    )


def test_a_download_resumes_over_cut_connections(tenant, made, content, tmp_path):
    calls = []
    # The manifest's answer comes whole; then the file breaks off three times, once after one byte.
    budgets = (1_000_000, 400, 900_000)
    with cutting(tenant.served.url, *budgets) as cutter, Client(cutter.url, tenant.key) as client:
        folder = client.download(made, tmp_path / "out", progress=lambda *call: calls.append(call))
        assert cutter.connections >= 4
    assert whole(folder, content)
    weights = [done for name, done, total in calls if name == WEIGHTS]
    assert weights == sorted(weights)
    assert weights[-1] == SIZE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_download_left_is_used_and_nothing_stands_under_the_name(
    tenant, made, content, tmp_path
):
    target = tmp_path / "out"
    with Client(tenant.served.url, tenant.key) as client:

        class Killed(Exception):
            pass

        def kill(name, done, total):
            if name == WEIGHTS and done > 1_000_000:
                raise Killed

        with pytest.raises(Killed):
            client.download(made, target, progress=kill)
        assert not target.exists()
        (part,) = tmp_path.glob(".out.*.part")
        there = (part / WEIGHTS).stat().st_size
        assert there >= 1_000_000
        assert not (part / "manifest.json").exists()
        asked = []

        def fetch(path, headers):
            asked.append((path.rpartition("/")[2], headers))
            return client._open(path, headers)

        checkpoint = client.checkpoint(made)
        download(fetch, checkpoint, target, None)
    digest = hashlib.sha256(content[WEIGHTS]).hexdigest()
    plain = {"Accept-Encoding": "identity"}
    assert (WEIGHTS, plain | {"Range": f"bytes={there}-", "If-Range": f'"{digest}"'}) in asked
    assert whole(target, content)


def test_bytes_that_changed_on_disk_are_found_and_not_published(tenant, made, content, tmp_path):
    part = tmp_path / f".out.{made}.part"
    part.mkdir()
    (part / WEIGHTS).write_bytes(b"\0" * 1000)
    with Client(tenant.served.url, tenant.key) as client:
        with pytest.raises(DownloadError, match="sha256"):
            client.download(made, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert whole(client.download(made, tmp_path / "out"), content)


def test_a_file_damaged_on_the_server_is_refused(tenant, made, tmp_path):
    stored = tenant.served.artefacts.path(f"checkpoints/{made}/{WEIGHTS}")
    damaged = bytearray(stored.read_bytes())
    damaged[SIZE // 2] ^= 1
    stored.write_bytes(damaged)
    with Client(tenant.served.url, tenant.key) as client, pytest.raises(DownloadError, match=WEIGHTS):
        client.download(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_touched(tenant, made, content, tmp_path):
    taken = tmp_path / "out"
    taken.mkdir()
    with Client(tenant.served.url, tenant.key) as client:
        (taken / "mine").write_text("mine")
        with pytest.raises(DownloadError, match="exists"):
            client.download(made, taken)
        assert [path.name for path in taken.iterdir()] == ["mine"]
        (taken / "mine").unlink()
        assert whole(client.download(made, taken), content)


def test_a_connection_that_brings_nothing_is_given_up(tenant, made, tmp_path, monkeypatch):
    monkeypatch.setattr("client.download.time.sleep", lambda seconds: None)
    with cutting(tenant.served.url, 100_000, *[0] * 50) as cutter, Client(cutter.url, tenant.key) as client:
        with pytest.raises(DownloadError, match="broke off") as failed:
            client.download(made, tmp_path / "out")
        assert "goes on from there" in failed.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "..", "a\\b", "C:x"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(DownloadError):
        _inside(tmp_path, name)
