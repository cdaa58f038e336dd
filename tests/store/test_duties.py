"""Who has a duty: one at a time, until it is given back or its holder falls silent."""

from __future__ import annotations

import threading
import time

from store import duties
from store.database import Database


def take(database: Database, holder: str, seconds: float, name: str = "sweep") -> bool:
    with database.write() as session:
        return duties.take(session, name, holder, seconds)


def keep(database: Database, holder: str, seconds: float) -> bool:
    with database.write() as session:
        return duties.keep(session, "sweep", holder, seconds)


def test_one_holder_at_a_time(database: Database) -> None:
    assert take(database, "a", 60)
    assert not take(database, "b", 60)
    assert take(database, "a", 60)  # its holder may begin again
    assert take(database, "b", 60, name="another")
    assert not keep(database, "b", 60)
    assert keep(database, "a", 0.001)
    time.sleep(0.01)
    assert take(database, "b", 60)
    assert not take(database, "a", 60)
    assert not keep(database, "a", 60)


def test_a_silent_holder_is_replaced_and_one_that_keeps_it_is_not(database: Database) -> None:
    assert take(database, "a", 0.3)
    assert keep(database, "a", 60)
    time.sleep(0.35)
    assert not take(database, "b", 60)
    assert keep(database, "a", 0.001)
    time.sleep(0.01)
    assert take(database, "b", 60)


def test_of_many_who_are_the_first_ever_one_wins(database: Database) -> None:
    barrier, won = threading.Barrier(6), list[int]()

    def race(number: int) -> None:
        barrier.wait()
        if take(database, str(number), 60):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
