"""Downloading: bytes exactly as made, by range, with digests that a client can check."""

import base64
import hashlib
import random

import pytest

from tests.serving import finish, on_sqlite

SIZE = 3 * (1 << 20) + 77  # several pieces of the server's reading, and no round number
NAME = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def content():
    return {NAME: random.Random(1).randbytes(SIZE), "config.json": b"{}", "empty.txt": b""}


@pytest.fixture
def made(tenant, tiny_model, tmp_path, content):
    """A finished job's checkpoint: its id."""
    files = content | {"delta.safetensors": b"delta"}
    return finish(tenant.served, tenant.run(tenant.submit(tiny_model)["id"]), tmp_path / "out", files)


def test_the_manifest_names_every_file(tenant, made, content):
    shown = tenant.http.get(f"/checkpoints/{made}").json()
    names = [file["name"] for file in shown["files"]]
    assert sorted(names) == sorted([*content, "delta.safetensors", "manifest.json"])
    assert names[-1] == "manifest.json"
    assert shown["bytes"] == sum(file["bytes"] for file in shown["files"])
    assert shown["manifest"]["base"]["model_type"] == "olmoe"
    for file in shown["files"]:
        got = tenant.http.get(f"/checkpoints/{made}/files/{file['name']}").content
        assert (len(got), hashlib.sha256(got).hexdigest()) == (file["bytes"], file["sha256"])
    job = tenant.http.get(shown["links"]["job"]).json()
    assert job["links"]["checkpoint"] == shown["links"]["self"]


def test_a_whole_file(tenant, made, content):
    answer = tenant.http.get(f"/checkpoints/{made}/files/{NAME}")
    digest = hashlib.sha256(content[NAME]).digest()
    assert answer.status_code == 200
    assert answer.content == content[NAME]
    assert answer.headers["ETag"] == f'"{digest.hex()}"'
    assert answer.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert "private" in answer.headers["Cache-Control"]


RANGES = {
    "bytes=0-0": (0, 1),
    "bytes=0-99": (0, 100),
    "bytes=1048570-1048580": (1048570, 1048581),
    f"bytes={SIZE - 1}-": (SIZE - 1, SIZE),
    "bytes=100-": (100, SIZE),
    "bytes=-5": (SIZE - 5, SIZE),
    f"bytes=-{SIZE + 10}": (0, SIZE),
    f"bytes=10-{SIZE * 2}": (10, SIZE),
    "Bytes = 3 - 4": (3, 5),
}


@on_sqlite
@pytest.mark.parametrize("asked", RANGES)
def test_a_range_is_exact_to_the_byte(tenant, made, content, asked):
    start, end = RANGES[asked]
    answer = tenant.http.get(f"/checkpoints/{made}/files/{NAME}", headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == content[NAME][start:end]
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert answer.headers["Content-Length"] == str(end - start)
    assert answer.headers["ETag"]


@on_sqlite
@pytest.mark.parametrize(
    "asked", ["bytes=5-3", "lines=0-1", "bytes=a-b", "bytes=-", "bytes", "bytes=0-1,5-6", "bytes=²-3"]
)
def test_a_range_that_cannot_be_understood_gives_the_whole_file(tenant, made, content, asked):
    headers = {"Range": asked.encode("latin-1")}
    answer = tenant.http.get(f"/checkpoints/{made}/files/{NAME}", headers=headers)
    assert (answer.status_code, answer.content == content[NAME]) == (200, True)


@on_sqlite
@pytest.mark.parametrize(
    ("name", "asked"), [(NAME, f"bytes={SIZE}-"), (NAME, "bytes=-0"), ("empty.txt", "bytes=0-")]
)
def test_a_range_outside_the_file_is_a_problem(tenant, made, content, name, asked):
    answer = tenant.http.get(f"/checkpoints/{made}/files/{name}", headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{len(content[name])}"


@on_sqlite
def test_if_range_guards_a_resumed_download(tenant, made, content):
    url = f"/checkpoints/{made}/files/{NAME}"
    etag = tenant.http.head(url).headers["ETag"]
    same = tenant.http.get(url, headers={"Range": "bytes=9-", "If-Range": etag})
    assert (same.status_code, same.content) == (206, content[NAME][9:])
    for other in ('"0000"', f"W/{etag}", "Tue, 24 Nov 2026 06:00:00 GMT"):
        changed = tenant.http.get(url, headers={"Range": "bytes=9-", "If-Range": other})
        assert (changed.status_code, changed.content == content[NAME]) == (200, True)


@on_sqlite
def test_head_says_all_and_sends_nothing(tenant, made):
    url = f"/checkpoints/{made}/files/{NAME}"
    head = tenant.http.head(url, headers={"Range": "bytes=0-5"})
    whole = tenant.http.get(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("ETag", "Content-Length", "Repr-Digest", "Accept-Ranges", "Content-Type"):
        assert head.headers[name] == whole.headers[name]


@on_sqlite
def test_a_file_that_is_there_already_is_not_sent_again(tenant, made):
    url = f"/checkpoints/{made}/files/{NAME}"
    etag = tenant.http.head(url).headers["ETag"]
    answer = tenant.http.get(url, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (304, b"")


@on_sqlite
def test_the_delta_has_an_address_of_its_own(tenant, made):
    assert tenant.http.get(f"/checkpoints/{made}/delta").content == b"delta"
    assert tenant.http.get(f"/checkpoints/{made}/delta", headers={"Range": "bytes=1-2"}).content == b"el"
    assert tenant.http.head(f"/checkpoints/{made}/delta").headers["Content-Length"] == "5"


def test_a_checkpoint_without_delta_says_so(tenant, tiny_model, tmp_path):
    made = finish(
        tenant.served, tenant.run(tenant.submit(tiny_model)["id"]), tmp_path / "out", {"config.json": b"{}"}
    )
    answer = tenant.http.get(f"/checkpoints/{made}/delta")
    assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_file_not_found")


@pytest.mark.parametrize(
    "name", ["nothing.bin", "../../secret", "..%2f..%2fsecret", "%2fetc%2fpasswd", "config.json/", "%00"]
)
def test_only_files_of_the_manifest_exist(tenant, made, name):
    (tenant.served.settings.data_dir / "secret").write_text("not for you")
    connection = tenant.http.build_request("GET", "/")
    connection.url = connection.url.copy_with(raw_path=f"/checkpoints/{made}/files/{name}".encode())
    answer = tenant.http.send(connection)
    assert answer.status_code == 404
    # httpx tidies unescaped dots away before it sends, so that path ends elsewhere.
    wanted = "checkpoint_not_found" if name.startswith("../") else "checkpoint_file_not_found"
    assert answer.json()["code"] == wanted
