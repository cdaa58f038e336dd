"""A real receiver of webhooks for tests: HTTPS on the loopback interface, under a name that only the test knows."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAME = "hooks.example.com"


@dataclass
class Request:
    """What arrived; `headers` in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    server_name: str | None


@dataclass
class Receiver:
    """A running receiver. `answer` gets each request and the handler, and returns the status."""

    host: str
    port: int
    requests: list[Request] = field(default_factory=list)
    answer: Callable[[Request, BaseHTTPRequestHandler], int | None] = lambda _request, _handler: 200
    connections: int = 0

    def url(self, path: str = "/seuf", name: str = NAME) -> str:
        """Its address under its name."""
        return f"https://{name}:{self.port}{path}"


@dataclass(frozen=True)
class Certificate:
    """A certificate for NAME, and what trusts it."""

    file: Path

    @property
    def server(self) -> ssl.SSLContext:
        """For the receiver."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file)
        return context

    @property
    def client(self) -> ssl.SSLContext:
        """For the sender."""
        return ssl.create_default_context(cafile=str(self.file))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Self-signed, for NAME only."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "receiver.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return Certificate(file)


@contextmanager
def receiver_on(certificate: Certificate, host: str = "127.0.0.1") -> Iterator[Receiver]:
    """A receiver on a free port of `host`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            name = getattr(self.connection, "asked_for", None)
            request = Request(self.path, headers, self.rfile.read(length), name)
            receiver.requests.append(request)
            status = receiver.answer(request, self)
            if status is not None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: object, client_address: object) -> None:
            receiver.connections += 1
            context = certificate.server
            names: list[str | None] = []
            context.sni_callback = lambda _socket, name, _context: names.append(name)
            try:
                wrapped = context.wrap_socket(request, server_side=True)  # type: ignore[arg-type]
            except OSError:
                return  # the sender did not like us
            wrapped.asked_for = names[0] if names else None
            with wrapped:
                Handler(wrapped, client_address, self)

        def handle_error(self, *_: object) -> None:
            pass  # the sender hung up

    server = Server((host, 0), Handler)
    receiver = Receiver(host, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture
def receiver(certificate: Certificate) -> Iterator[Receiver]:
    """A receiver that takes everything, until told otherwise."""
    with receiver_on(certificate) as running:
        yield running


def drip(request: Request, handler: BaseHTTPRequestHandler) -> None:
    """Answer with a byte now and then, for ever, without a line that ends."""
    while True:
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.02)
