"""A download that is sent on: what the other server gets to see."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from client import Client, DownloadError
from client.errors import ApiError

KEY = "seuf_the_key_of_this_test"
CONTENT = b"weights" * 1000
FILE = {"name": "w", "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}


@contextmanager
def server(answer: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), answer)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class Store(Quiet):
    """Gives the bytes, in halves: the first connection breaks off. Busy at first."""

    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        if "denied" in self.path:
            self.send(403, b"<Error/>")
        elif len(self.seen) == 1:
            self.send(503, b"<Error>SlowDown</Error>")
        elif "Range" not in self.headers:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:3000])
        else:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send(206, CONTENT[start:])


def service(location: str) -> type[Quiet]:
    class Service(Quiet):
        def do_GET(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {KEY}"
            if self.path.endswith("/files/w"):
                self.send(307, Location=location)
            else:
                self.send(200, json.dumps({"id": "ckpt_1", "files": [FILE]}).encode())

    return Service


@pytest.fixture
def seen() -> list[dict[str, str]]:
    Store.seen = []
    return Store.seen


def test_the_key_stays_here_and_the_download_resumes_there(
    seen: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.download.time.sleep", lambda seconds: None)
    with server(Store) as store, server(service(f"{store}/w?Signature=1")) as url, Client(url, KEY) as client:
        folder = client.download("ckpt_1", tmp_path / "out")
    assert (folder / "w").read_bytes() == CONTENT
    assert [headers.get("range") for headers in seen] == [None, None, "bytes=3000-"]
    for headers in seen:
        assert not {"authorization", "if-range"} & headers.keys()
        assert KEY not in str(headers)


def test_a_refusal_of_the_store_does_not_tell_its_address(seen: list[dict[str, str]], tmp_path: Path) -> None:
    with (
        server(Store) as store,
        server(service(f"{store}/denied?Signature=secret")) as url,
        Client(url, KEY) as client,
        pytest.raises(ApiError, match="403") as refused,
    ):
        client.download("ckpt_1", tmp_path / "out")
    assert "secret" not in str(refused.value)


def test_a_download_is_never_sent_on_to_plain_http() -> None:
    with Client("https://service.example", KEY) as client, pytest.raises(DownloadError, match="TLS"):
        client._follow(httpx.URL("https://service.example/x"), httpx.URL("http://store.example/x"), {})
