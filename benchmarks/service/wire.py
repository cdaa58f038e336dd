"""A lean HTTP/1.1 client over one kept connection: what it adds to a request is a small part of what is measured."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


@dataclass
class Wire:
    """One connection to one server. headers: what every request carries."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        assert address.hostname is not None
        self.connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request and read its answer whole."""
        self.connection.request(method, path, body, {**self.headers, **headers})
        answer = self.connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())

    def post(self, path: str, content: Any) -> Answer:
        """POST a JSON document."""
        return self.ask("POST", path, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99; of a hundred values or more they mean what they say."""
    cut = quantiles(seconds, n=100, method="inclusive")
    return {"p50": cut[49], "p95": cut[94], "p99": cut[98]}
