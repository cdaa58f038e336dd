"""A TCP proxy that breaks connections, to see how a client lives with a real network."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Cutter:
    """Passes bytes on to `target`; the answers of each new connection end after the next budget of the list.

    Attributes:
        budgets: bytes the server may send on the next connections; an empty list means no limit.
        connections: how many were opened.
        sent: bytes that clients sent.
    """

    def __init__(self, target: str, budgets: list[int]) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self.budgets = budgets
        self.connections = 0
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _count(self, size: int) -> None:
        self.sent += size

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            budget = self.budgets.pop(0) if self.budgets else None
            outer = socket.create_connection(self._target)
            threading.Thread(target=_copy, args=(inner, outer, None, self._count), daemon=True).start()
            threading.Thread(target=_copy, args=(outer, inner, budget), daemon=True).start()


def _copy(
    source: socket.socket, target: socket.socket, budget: int | None, count: Callable[[int], None] | None = None
) -> None:
    try:
        while data := source.recv(65536):
            if count is not None:
                count(len(data))
            if budget is not None:
                data, budget = data[:budget], budget - len(data)
            target.sendall(data)
            if budget is not None and budget <= 0:
                break
    except OSError:
        pass
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def cutting(target: str, *budgets: int) -> Iterator[Cutter]:
    """A proxy before `target` whose first connections are cut after these many bytes."""
    cutter = Cutter(target, list(budgets))
    try:
        yield cutter
    finally:
        cutter.close()
