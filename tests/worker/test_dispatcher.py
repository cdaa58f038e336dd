"""The dispatcher: what the broker is told, when it is away, and what it lost."""

from __future__ import annotations

import threading

import pytest
import redis

from store.database import Database
from store.outbox import Outbox
from store.settings import Settings
from tests.seeds import add_job, add_running, get_job
from tests.services import free_port, redis_on, wait_until
from worker import dispatcher
from worker.app import QUEUE, CeleryBroker, celery_app


def pending(database: Database) -> list[str]:
    with database.read() as session:
        return [message.job_id for message in Outbox(session).pending()]


def test_lost_messages_are_sent_again(database: Database, redis_url: str) -> None:
    broker = CeleryBroker(celery_app(redis_url))
    server = redis.Redis.from_url(redis_url)
    jobs = [add_job(database) for _ in range(2)]
    assert dispatcher.publish_outbox(database, broker) == 2
    assert (server.llen(QUEUE), pending(database)) == (2, [])
    assert dispatcher.publish_outbox(database, broker) == 0
    # While the broker holds messages, their age says nothing.
    assert not broker.is_empty()
    assert dispatcher.resend_lost(database, broker, older_than_seconds=0) == 0
    server.flushall()
    assert broker.is_empty()
    assert dispatcher.resend_lost(database, broker, older_than_seconds=60) == 0
    assert dispatcher.resend_lost(database, broker, older_than_seconds=0) == 2
    assert pending(database) == jobs
    assert dispatcher.publish_outbox(database, broker) == 2
    assert server.llen(QUEUE) == 2


def test_a_broker_that_is_away_is_waited_for(database: Database) -> None:
    """Nothing is marked, leases are released all the same, and the loop goes on."""
    expired = add_running(database, lease_seconds=0.001).job_id
    waiting = add_job(database)
    port = free_port()
    broker = CeleryBroker(celery_app(f"redis://127.0.0.1:{port}/0"))
    with pytest.raises(ConnectionError):
        broker.publish(waiting)
    with pytest.raises(ConnectionError):
        broker.is_empty()
    ended = threading.Event()
    thread = threading.Thread(target=dispatcher.loop, args=(database, Settings(), broker, ended.wait))
    thread.start()
    try:
        wait_until(lambda: get_job(database, expired).status == "queued", 20, "the expired lease")
        assert sorted(pending(database)) == sorted([waiting, expired])
        with redis_on(port) as url:
            wait_until(lambda: pending(database) == [], 20, "the messages to be published")
            assert redis.Redis.from_url(url).llen(QUEUE) == 2
    finally:
        ended.set()
        thread.join(20)
    assert not thread.is_alive()
