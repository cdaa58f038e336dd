"""Tasks in threads: results in order, bytes told in the caller's thread, and one end for all."""

import threading
import time

import pytest

from seuf_core.checkpoint.threads import in_threads


def test_results_are_in_the_tasks_order_and_every_byte_is_told():
    told: list[int] = []
    here = {threading.get_ident()}

    def task(index, done):
        assert threading.get_ident() not in here
        time.sleep(0.01 * (5 - index))
        done(10 << 20)
        done(40 << 20)
        done(index)
        return str(index)

    def done(size):
        assert threading.get_ident() in here
        told.append(size)

    tasks = [lambda done, index=index: task(index, done) for index in range(5)]
    assert in_threads(tasks, done) == ["0", "1", "2", "3", "4"]
    assert sorted(told) == [0, 1, 2, 3, 4, *[50 << 20] * 5]
    assert in_threads([], done) == []


def _forever(done):
    while True:
        done(1 << 20)


def test_an_error_of_one_ends_the_others_and_is_the_one_raised():
    def broken(done):
        time.sleep(0.01)
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        in_threads([_forever, broken, _forever, _forever, _forever], lambda _: None)


def test_an_error_of_the_caller_ends_all():
    def stop(size):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        in_threads([_forever] * 9, stop)
    assert threading.active_count() == before
