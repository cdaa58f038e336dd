"""One request to a receiver, over a connection to an address that was checked.

The host is resolved once, every address is checked, and the socket goes to one of those: what the name says a moment
later does not matter. TLS and the Host header still carry the name. No redirects, no proxy of the environment, and
one deadline for the whole exchange, however slowly a receiver drips.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import httpcore
import httpx

from store.receivers import Receivers, Target

Resolve = Callable[[str, int], Sequence[str]]

READ_BYTES: Final = 4096
"""Of a receiver's answer, so that it can end in good order; nothing of it is kept."""


class NoAddressError(Exception):
    """The receiver's name has no address now."""


def resolve(host: str, port: int) -> list[str]:
    """Every address of a name, as the system sees it; NoAddressError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NoAddressError from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@lru_cache(maxsize=1)
def tls() -> ssl.SSLContext:
    """Certificates as httpx has them: its own list, or SSL_CERT_FILE."""
    return httpx.create_ssl_context()


def post(
    receivers: Receivers,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    seconds: float,
    *,
    resolver: Resolve = resolve,
    context: ssl.SSLContext | None = None,
) -> int:
    """The status of the answer.

    ReceiverRefusedError: the URL or one of its addresses is not allowed. NoAddressError, httpcore.NetworkError,
    httpcore.TimeoutException, httpcore.ProtocolError: no answer came.
    """
    ends_at = time.monotonic() + seconds
    target = receivers.target(url)
    addresses = receivers.check(target, resolver(target.host, target.port))
    where = httpcore.URL(
        scheme=b"https" if target.secure else b"http",
        host=target.host.encode(),
        port=target.port,
        target=target.path.encode(),
    )
    with (
        httpcore.ConnectionPool(
            ssl_context=context or tls(), http2=False, network_backend=_Pinned(target, addresses, ends_at)
        ) as pool,
        pool.stream("POST", where, headers=[("Host", target.authority), *headers.items()], content=body) as response,
    ):
        read = 0
        for part in response.iter_stream():
            read += len(part)
            if read >= READ_BYTES:
                break
        return int(response.status)


class _Pinned(httpcore.NetworkBackend):
    """Connects to the checked addresses of one target, and to nothing else."""

    def __init__(self, target: Target, addresses: Sequence[str], ends_at: float) -> None:
        self.target = target
        self.addresses = addresses
        self.ends_at = ends_at

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  (ours is that of the whole exchange)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """The first address that answers."""
        assert (host, port) == (self.target.host, self.target.port)
        refused: httpcore.ConnectError = httpcore.ConnectError("no address")
        for address in self.addresses:
            left = _left(self.ends_at, httpcore.ConnectTimeout)
            try:
                stream = httpcore.SyncBackend().connect_tcp(
                    address, port, left, local_address, socket_options
                )
            except httpcore.ConnectError as error:
                refused = error
            else:
                return _Timed(stream, self.ends_at)
        raise refused


class _Timed(httpcore.NetworkStream):
    """A stream whose every act ends at the same moment."""

    def __init__(self, stream: httpcore.NetworkStream, ends_at: float) -> None:
        self.stream = stream
        self.ends_at = ends_at

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """See httpcore."""
        return self.stream.read(max_bytes, _left(self.ends_at, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """See httpcore."""
        self.stream.write(buffer, _left(self.ends_at, httpcore.WriteTimeout))

    def close(self) -> None:
        """See httpcore."""
        self.stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """See httpcore."""
        left = _left(self.ends_at, httpcore.ConnectTimeout)
        return _Timed(self.stream.start_tls(ssl_context, server_hostname, left), self.ends_at)

    def get_extra_info(self, info: str) -> Any:
        """See httpcore."""
        return self.stream.get_extra_info(info)


def _left(ends_at: float, error: type[httpcore.TimeoutException]) -> float:
    left = ends_at - time.monotonic()
    if left <= 0:
        raise error
    return left
