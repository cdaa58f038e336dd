"""Uploads of the client: in one request or in parts, over connections that break, taken up again after a cut."""

import hashlib
import json

import pytest

from client import ApiError, Client, UnreachableError
from tests.cutting import cutting
from tests.serving import lines_of

PART = 8 << 20  # the service's default


@pytest.fixture
def big(tmp_path):
    """A set of two and a half parts: more than the service of the tests takes in one request (2 MiB)."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as out:
        for number in range(160):
            text = f"{number} " + "x" * 131_000
            out.write(json.dumps({"text": text}) + "\n")
    assert 2 * PART < path.stat().st_size < 3 * PART
    return path


def opened(tenant):
    return tenant.http.get("/uploads").json()["data"]


def test_a_file_over_the_cap_of_one_request_goes_in_parts(tenant, big):
    seen = []
    with Client(tenant.served.url, tenant.key) as client:
        file = client.upload(big, "forget", progress=lambda *facts: seen.append(facts))
    assert file["sha256"] == hashlib.sha256(big.read_bytes()).hexdigest()
    assert file["examples"] == 160
    size = big.stat().st_size
    assert seen == [("big.jsonl", PART, size), ("big.jsonl", 2 * PART, size), ("big.jsonl", size, size)]
    assert opened(tenant) == []


def test_a_cut_upload_goes_on_where_it_was_even_in_another_process(tenant, big, monkeypatch):
    monkeypatch.setattr("client.client.PARTS_OVER", 0)
    stops = []

    def stop(_name, done, _total):
        stops.append(done)
        if len(stops) == 2:
            raise KeyboardInterrupt

    with Client(tenant.served.url, tenant.key) as client, pytest.raises(KeyboardInterrupt):
        client.upload(big, "forget", progress=stop)
    (there,) = opened(tenant)
    assert [part["number"] for part in there["parts"]] == [1, 2]
    with cutting(tenant.served.url) as cutter, Client(cutter.url, tenant.key) as client:
        file = client.upload(big, "forget")
        assert cutter.sent < 2 * PART  # the first two parts are not sent again
    assert file["sha256"] == there["sha256"]
    assert tenant.http.get(f"/uploads/{there['id']}").json()["file"] == file["id"]


def test_parts_are_sent_again_over_broken_connections(tenant, big, monkeypatch):
    monkeypatch.setattr("client.client.PARTS_OVER", 0)
    # Some answers break off at their first byte: the part is there, and its answer is lost.
    with cutting(tenant.served.url, 2500, 1, 1) as cutter, Client(cutter.url, tenant.key) as client:
        file = client.upload(big, "retain")
        assert cutter.connections == 4
    assert file["purpose"] == "retain"
    assert len(tenant.http.get("/files").json()["data"]) == 1


def test_a_connection_that_keeps_breaking_is_said(tenant, big, monkeypatch):
    monkeypatch.setattr("client.client.RETRIES", 1)
    monkeypatch.setattr("client.client.PARTS_OVER", 0)
    with (
        cutting(tenant.served.url, 1, 1, 1, 1) as cutter,
        Client(cutter.url, tenant.key) as client,
        pytest.raises(UnreachableError),
    ):
        client.upload(big, "forget")


def test_a_refused_upload_is_given_up(tenant, big, monkeypatch):
    with big.open("a") as out:
        out.write("{broken\n")
    with Client(tenant.served.url, tenant.key) as client, pytest.raises(ApiError) as refused:
        client.upload(big, "forget")
    assert (refused.value.code, refused.value.errors[0]["line"]) == ("invalid_examples", 161)
    assert opened(tenant) == []
    folder = tenant.served.artefacts.path("uploads")
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_format_may_be_said(tenant, tmp_path):
    path = tmp_path / "export.dat"
    path.write_text("text\nGold is soft.\n")
    with Client(tenant.served.url, tenant.key) as client:
        assert client.upload(path, "forget", format="csv")["format"] == "csv"
        path.write_text("\n".join(lines_of("forget")))
        assert client.upload(path, "forget")["format"] == "jsonl"
