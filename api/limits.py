"""How many requests a key may make, and how often an address may try keys that are not valid.

Counted in a window that slides over a minute. Without a broker each API process counts for itself; with one, all of
them count together in Redis. If Redis is away they count for themselves again: a limit is no reason to stop working.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from api.problems import Problem

log = logging.getLogger("seuf.api")
T = TypeVar("T")

FAILURES_PER_MINUTE: Final = 30
"""Keys that are not valid, from one address. (220 random bits are not guessed; this spares the database.)"""
WINDOW_SECONDS: Final = 60
REDIS_SECONDS: Final = 0.25  # what a request waits for Redis at most
AGAIN_SECONDS: Final = 10.0  # between two tries of a Redis that was away


class RateLimits:
    """The counters of one API process."""

    def __init__(self, broker_url: str) -> None:
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared = _on_redis(broker_url) if broker_url else None
        self._away_until = -math.inf

    async def count(self, key_id: str, per_minute: int) -> dict[str, str]:
        """One more request of a key; what to tell its sender about it. Problem 429 when it is one too many.

        The headers are those of draft-ietf-httpapi-ratelimit-headers-10. `per_minute` 0: nothing is counted.
        """
        if per_minute == 0:
            return {}
        item = RateLimitItemPerMinute(per_minute)
        allowed = await self._ask(lambda limiter: limiter.hit(item, "key", key_id))
        window = await self._ask(lambda limiter: limiter.get_window_stats(item, "key", key_id))
        # The window's reset is when one more place is free, not when all are.
        seconds = max(1, math.ceil(window.reset_time - time.time()))
        headers = {
            "RateLimit-Policy": f'"requests";q={per_minute};w={WINDOW_SECONDS}',
            "RateLimit": f'"requests";r={window.remaining if allowed else 0};t={seconds}',
        }
        if not allowed:
            raise Problem(
                429,
                "rate_limited",
                f"This key makes more than {per_minute} requests a minute.",
                f"Wait {seconds} s (Retry-After), and ask less often: GET /jobs/{{id}}/events streams changes.",
                headers={"Retry-After": str(seconds), **headers},
            )
        return headers

    async def check_failures(self, address: str) -> None:
        """Problem 429 when this address has tried too many keys that are not valid."""
        item = RateLimitItemPerMinute(FAILURES_PER_MINUTE)
        if not await self._ask(lambda limiter: limiter.test(item, "failure", address)):
            window = await self._ask(lambda limiter: limiter.get_window_stats(item, "failure", address))
            seconds = max(1, math.ceil(window.reset_time - time.time()))
            raise Problem(
                429,
                "too_many_invalid_keys",
                f"More than {FAILURES_PER_MINUTE} invalid keys in a minute came from this address.",
                f"Wait {seconds} s (Retry-After), then use a valid key.",
                headers={"Retry-After": str(seconds)},
            )

    async def count_failure(self, address: str) -> None:
        """This address has tried a key that is not valid."""
        item = RateLimitItemPerMinute(FAILURES_PER_MINUTE)
        await self._ask(lambda limiter: limiter.hit(item, "failure", address))

    async def _ask(self, question: Callable[[SlidingWindowCounterRateLimiter], Awaitable[T]]) -> T:
        """Ask the shared counters, or our own while those are away."""
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                return await question(self._shared)
            except StorageError as error:
                self._away_until = time.monotonic() + AGAIN_SECONDS
                log.warning(
                    "Redis is away (%s): this process counts its requests alone", type(error).__name__
                )
        return await question(self._here)


def _on_redis(broker_url: str) -> SlidingWindowCounterRateLimiter:
    storage = RedisStorage(
        f"async+{broker_url}",
        implementation="redispy",
        wrap_exceptions=True,
        key_prefix="seuf-limits",
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
    )
    return SlidingWindowCounterRateLimiter(storage)
