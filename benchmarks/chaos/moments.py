"""Moments that chance would seldom hit. Locks in the database hold a program exactly there while it is killed."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import redis
from sqlalchemy import select, text

from benchmarks.chaos.keeper import Program, descendants
from benchmarks.chaos.orders import Order
from benchmarks.chaos.scene import Scene
from store.tables import Checkpoint, OutboxMessage

BOUNDARY: Final = "seuf-chaos"
QUEUE: Final = "seuf"
STEP_SECONDS: Final = 0.003
PATIENCE_SECONDS: Final = 8.0
"""How long a fault waits for a job in the phase it wants."""


def idle(scene: Scene, api: Program) -> None:
    """The API does what it happens to do."""
    if scene.service.keeper.kill(api):
        scene.note("kill api", "any time", "api")


def submitting(scene: Scene, api: Program) -> None:
    """A job has been sent, and no answer has come yet; the ledger sends it again."""
    order = scene.ledger.next
    if order is None or not scene.ledger.may_submit(order.number):
        idle(scene, api)
        return
    body, headers = scene.ledger.body(order), scene.ledger.headers(order)
    connection = _send(scene, "/jobs", body, headers)
    time.sleep(scene.rng.uniform(0, 0.05))
    if scene.service.keeper.kill(api):
        scene.note("kill api", "submitting", "api")
    connection.close()


def uploading(scene: Scene, api: Program) -> None:
    """Half a file has arrived."""
    connection = _send(scene, "/files", *half_a_file())
    time.sleep(scene.rng.uniform(0, 0.05))
    if scene.service.keeper.kill(api):
        scene.note("kill api", "uploading", "api")
    connection.close()


def half_a_file(size: int = 200_000) -> tuple[bytes, dict[str, str]]:
    """The first part of an upload whose headers promise twice as much."""
    line = b'{"prompt": "This was never", "completion": " sent whole."}\n'
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nforget\r\n--{BOUNDARY}\r\n'
        f'Content-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n'
    )
    body = head.encode() + line * (size // len(line))
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return body, {"Content-Type": kind, "Content-Length": str(2 * len(body))}


def _send(scene: Scene, path: str, body: bytes, headers: dict[str, str]) -> http.client.HTTPConnection:
    """Send, and do not wait for the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", scene.service.ports["api"], timeout=10)
    with suppress(OSError):
        connection.putrequest("POST", path)
        length = {} if "Content-Length" in headers else {"Content-Length": str(len(body))}
        for name, value in {**headers, **length, "Authorization": f"Bearer {scene.service.key}"}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
    return connection


def truncated_upload(scene: Scene) -> None:
    """A client that goes away in the middle of a file, with the API alive."""
    connection = _send(scene, "/files", *half_a_file())
    scene.nap(scene.rng.uniform(0, 0.1))
    connection.close()
    scene.note("upload cut off", "uploading")


def before_publish(scene: Scene, dispatcher: Program) -> None:
    """A job is committed while the dispatcher stands still; then the dispatcher is killed."""
    if dispatcher.pid is None:
        return
    os.kill(dispatcher.pid, signal.SIGSTOP)
    before = _pending(scene)
    order = _submit_next(scene)
    if order is not None:
        scene.until(lambda: bool(_pending(scene) - before), 5)
    if scene.service.keeper.kill(dispatcher):
        phase = "committed, not published" if _pending(scene) - before else "any time"
        scene.note("kill dispatcher", phase, "dispatcher", order)


def before_mark(scene: Scene, dispatcher: Program) -> None:
    """The dispatcher has told the broker of a job, and a lock keeps it from noting so; then it is killed."""
    if dispatcher.pid is None:
        return
    broker = redis.Redis(port=scene.service.ports["redis"])
    with suppress(redis.RedisError), scene.service.database.writing_engine.connect() as lock:
        # A lock that lets inserts through (a submit) and updates not (the mark, and a worker's claim).
        lock.execute(text("SET LOCAL lock_timeout = '2s'"))
        order = _submit_next(scene)
        if order is None:
            return
        before = broker.llen(QUEUE)
        row = select(OutboxMessage.id).where(
            OutboxMessage.job_id.in_(order.ids), OutboxMessage.published_at.is_(None)
        )
        locked = lock.execute(row.with_for_update()).all()
        published = bool(locked) and _soon(lambda: broker.llen(QUEUE) > before, 2)
        if scene.service.keeper.kill(dispatcher):
            phase = "published, not marked" if published else "any time"
            scene.note("kill dispatcher", phase, "dispatcher", order)
        lock.rollback()


def _submit_next(scene: Scene) -> Order | None:
    """The next job, submitted now, if one is due and the API takes it."""
    order = scene.ledger.next
    if order is None or not scene.ledger.may_submit(order.number):
        return None
    scene.ledger.submit(order)
    return order if order.ids else None


def _pending(scene: Scene) -> set[int]:
    with scene.service.database.read() as session:
        return set(session.scalars(select(OutboxMessage.id).where(OutboxMessage.published_at.is_(None))))


def unpublished(scene: Scene) -> None:
    """A result lies in the storage and no row names it yet; then its engine is killed.

    On Postgres a lock keeps the row from being written; on SQLite the kill only has to be fast.
    """
    late = lambda: scene.held("publishing") or scene.held("evaluating")  # noqa: E731
    scene.until(lambda: bool(late()) or not scene.ledger.open, PATIENCE_SECONDS)
    order = next(iter(late()), None)
    if order is None or order.state is None:
        return
    before = _folders(scene)
    with scene.service.database.writing_engine.connect() as lock:
        if scene.service.lane == "celery":
            lock.execute(text("SET LOCAL lock_timeout = '2s'"))
            lock.execute(text("LOCK TABLE checkpoints IN SHARE MODE"))
        engines = descendants(order.state.supervisor or 0)
        arrived = _soon(lambda: bool(_folders(scene) - before), 4)
        for pid in engines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        lock.rollback()
    with scene.service.database.read() as session:
        rows = set(session.scalars(select(Checkpoint.id)))
    orphans = _folders(scene) - before - rows
    if engines:
        phase = "stored, no row" if arrived and orphans else order.phase or "ended"
        scene.note("kill engine", phase, "engine", order)


def _folders(scene: Scene) -> set[str]:
    folder = scene.service.disk / "artefacts" / "checkpoints"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _soon(true: Callable[[], bool], seconds: float) -> bool:
    """Look without doing anything else: the programs under the lock must not be kept waiting."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(STEP_SECONDS)
    return False
