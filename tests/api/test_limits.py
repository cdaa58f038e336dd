"""Rates: of each key, and of invalid keys by address; in Redis where there is one, alone where it is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import limits
from api.app import create_app
from api.limits import RateLimits
from api.problems import Problem
from api.settings import ApiSettings
from store.database import Database
from store.keys import Keys
from store.tenants import Tenants
from tests.services import free_port, redis_on
from tests.serving import SECRET, serve

Start = Callable[..., tuple[str, Database]]


@pytest.fixture(autouse=True)
def away_from_the_turn_of_a_minute() -> None:
    """Requests are counted by whole minutes and weighed between two: across a turn one more is let through."""
    left = limits.WINDOW_SECONDS - time.time() % limits.WINDOW_SECONDS
    if left < 10:  # no test takes so long
        time.sleep(left)


@pytest.fixture
def start(tmp_path: Path, sqlite_template: Path) -> Iterator[Start]:
    """Serves an API with these settings; several calls share a database."""
    url = f"sqlite:///{tmp_path / 'seuf.db'}"
    (tmp_path / "seuf.db").write_bytes(sqlite_template.read_bytes())
    with ExitStack() as stack:

        def started(**given: Any) -> tuple[str, Database]:
            settings = ApiSettings(
                data_dir=tmp_path, database_url=url, secret=SECRET.decode(), lane="database", **given
            )
            return stack.enter_context(serve(create_app(settings))), Database(url)

        yield started


def client(address: str, database: Database, tenant: str = "default") -> httpx.Client:
    with database.write() as session:
        token = Keys(session, tenant).create("k", SECRET).token
    return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"})


def statuses(http: httpx.Client, number: int) -> list[int]:
    return [http.get("/jobs").status_code for _ in range(number)]


def test_a_key_has_its_rate_and_hears_of_it(start: Start) -> None:
    address, database = start(requests_per_minute=5)
    one, other = client(address, database), client(address, database)
    first = one.get("/jobs")
    assert first.headers["ratelimit-policy"] == '"requests";q=5;w=60'
    assert first.headers["ratelimit"].startswith('"requests";r=4;t=')
    assert statuses(one, 4) == [200] * 4
    refused = one.get("/jobs")
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert "5 requests a minute" in refused.json()["detail"]
    assert other.get("/jobs").status_code == 200
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_tenant_has_its_own_rate(start: Start) -> None:
    address, database = start(requests_per_minute=2)
    with database.write() as session:
        Tenants(session).create("fast").requests_per_minute = 0
        Tenants(session).create("slow").requests_per_minute = 1
    free = client(address, database, "fast")
    assert statuses(free, 5) == [200] * 5
    assert "ratelimit" not in free.get("/jobs").headers
    assert statuses(client(address, database, "slow"), 2) == [200, 429]
    assert statuses(client(address, database), 3) == [200, 200, 429]


def test_invalid_keys_are_counted_by_address(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FAILURES_PER_MINUTE", 3)
    address, database = start()
    known, fresh = client(address, database), client(address, database)
    assert known.get("/jobs").status_code == 200
    wrong = httpx.Client(base_url=address, headers={"Authorization": "Bearer seuf_wrong"})
    assert statuses(wrong, 3) == [401] * 3
    refused = wrong.get("/jobs")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_invalid_keys")
    assert int(refused.headers["retry-after"]) >= 1
    # Whoever works from there already goes on; who comes anew waits.
    assert known.get("/jobs").status_code == 200
    assert fresh.get("/jobs").status_code == 429
    assert httpx.get(f"{address}/jobs").json()["code"] == "missing_key"


def test_processes_count_together_in_redis_and_alone_without_it(start: Start) -> None:
    port = free_port()
    with redis_on(port) as redis:
        (one, database), (two, _) = (start(requests_per_minute=4, broker_url=redis) for _ in range(2))
        here = client(one, database)
        there = httpx.Client(base_url=two, headers=here.headers)
        assert statuses(here, 2) + statuses(there, 2) == [200] * 4
        assert [here.get("/jobs").status_code, there.get("/jobs").status_code] == [429, 429]
    # Redis is gone: nobody is shut out, and a limit still holds.
    assert statuses(here, 4) == [200] * 4
    assert here.get("/jobs").status_code == 429


def test_a_redis_that_hangs_costs_one_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers."""

    async def check() -> None:
        async def silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await asyncio.Event().wait()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        rates = RateLimits(f"redis://127.0.0.1:{port}/0")
        began = asyncio.get_running_loop().time()
        for _ in range(3):
            await rates.count("key_a", 3)
        assert asyncio.get_running_loop().time() - began < 4 * limits.REDIS_SECONDS
        with pytest.raises(Problem):
            await rates.count("key_a", 3)
        server.close()

    asyncio.run(check())
