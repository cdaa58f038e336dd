"""The live events of every job that somebody watches here: one look at the database for all watchers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from starlette.concurrency import run_in_threadpool

from api import views
from store.database import Database
from store.events import Events, Head
from store.tables import Event

log = logging.getLogger("seuf.api")

LOOK_SECONDS: Final = 0.25  # between two looks; what an event waits at most
SILENCE_SECONDS: Final = 15.0  # after this long without an event a watcher hears that we are still here
BATCH: Final = 500  # events of one job in one read
KEPT: Final = 200  # newest messages of a job that are kept; who is further behind reads the database


class Message(NamedTuple):
    """An event as it goes over the wire."""

    seq: int
    text: bytes


Key = tuple[str, str]
"""Tenant and job."""


class _Followed:
    """A job that is watched: how far its events are known here, and the newest of them."""

    def __init__(self, head: Head) -> None:
        self.seq, self.ended = head.seq, head.ended
        self.watchers = 0
        self.moved = asyncio.Event()
        self._kept: deque[Message] = deque(maxlen=KEPT)

    def after(self, seq: int) -> list[Message] | None:
        """The messages behind `seq` that are known; None when some of them are not kept here."""
        missing = max(self.seq - seq, 0)
        if missing > len(self._kept):
            return None
        return list(islice(self._kept, len(self._kept) - missing, None))

    def move(self, messages: list[Message], ended: bool) -> None:
        """Take in what is new, and wake everybody who waits."""
        self._kept.extend(messages)
        self.seq = messages[-1].seq if messages else self.seq
        self.ended = ended
        self.moved.set()
        self.moved = asyncio.Event()


class Feed:
    """Looks for all watchers of this process together, as long as there are any.

    Five hundred people who watch one job cost one query a look, and each event is read and written as JSON once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._followed: dict[Key, _Followed] = {}
        self._looking: asyncio.Task[None] | None = None

    async def messages(self, tenant: str, job_id: str, head: Head, after: int) -> AsyncIterator[bytes]:
        """What an event stream says: every event behind `after` as it comes, ending after the job's last.

        head: where the job stood a moment ago (Events.head).
        """
        followed = self._join((tenant, job_id), head)
        try:
            while True:
                moved = followed.moved  # asked for first: what comes from here on sets it
                fresh = followed.after(after)
                if fresh is None:
                    fresh = await run_in_threadpool(self._read, tenant, job_id, after)
                if fresh:
                    after = fresh[-1].seq
                    yield b"".join(message.text for message in fresh)
                elif followed.ended:
                    return
                elif not await _set_within(moved, SILENCE_SECONDS):
                    yield b": still here\n\n"
        finally:
            self._leave((tenant, job_id), followed)

    def _join(self, key: Key, head: Head) -> _Followed:
        followed = self._followed.setdefault(key, _Followed(head))
        followed.watchers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on(), name="feed")
        return followed

    def _leave(self, key: Key, followed: _Followed) -> None:
        followed.watchers -= 1
        if not followed.watchers:
            del self._followed[key]

    async def _look_on(self) -> None:
        while self._followed:
            await asyncio.sleep(LOOK_SECONDS)
            running = {key: followed.seq for key, followed in self._followed.items() if not followed.ended}
            try:
                found = await run_in_threadpool(self._look, running)
            except Exception as error:  # whatever a look throws, the streams wait for the next one
                log.warning("no look at the events (%s)", type(error).__name__)
                continue
            for key, (messages, ended) in found.items():
                if key in self._followed:  # else its last watcher has just left
                    self._followed[key].move(messages, ended)

    def _look(self, running: Mapping[Key, int]) -> dict[Key, tuple[list[Message], bool]]:
        """The jobs that moved since: their new messages, and whether those are their last."""
        found = {}
        with self._database.read() as session:
            for tenant in {tenant for tenant, _ in running}:
                events = Events(session, tenant)
                for head in events.heads([job for owner, job in running if owner == tenant]):
                    key = (tenant, head.job_id)
                    if head.seq > running[key] or head.ended:
                        messages = [_message(row) for row in events.list(head.job_id, running[key], BATCH)]
                        last = messages[-1].seq if messages else running[key]
                        found[key] = messages, head.ended and last >= head.seq
        return found

    def _read(self, tenant: str, job_id: str, after: int) -> list[Message]:
        with self._database.read() as session:
            return [_message(row) for row in Events(session, tenant).list(job_id, after, BATCH)]


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _message(row: Event) -> Message:
    event: dict[str, Any] = views.event(row).model_dump(mode="json")
    # ASCII only: no character in it can be taken for the end of a line, whatever a client splits at.
    return Message(row.seq, f"id: {row.seq}\nevent: {row.type}\ndata: {json.dumps(event)}\n\n".encode())
