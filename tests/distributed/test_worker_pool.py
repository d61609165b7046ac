"""Ranks that stay: what they answer, and how they end."""

import os
import signal
import time
from multiprocessing import connection

import pytest

from gengap_dist.distributed.cores import Threads
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.distributed.worker_pool import RankFailed, Worker, WorkerPool
from gengap_dist.errors import UsageError

pytestmark = pytest.mark.processes
TWO = Threads(2, "test")


def describe(worker: Worker, word: str) -> tuple[int, int, str, str, str]:
    return worker.rank, worker.threads, os.environ["OMP_NUM_THREADS"], os.environ["COLOUR"], word


def fail(worker: Worker, kind: str) -> None:
    if worker.rank == 1:
        if kind == "usage":
            raise UsageError("a sentence")
        if kind == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a reason")
    time.sleep(60)


def count_until_asked_to_stop(worker: Worker) -> None:
    for step in range(10_000):
        worker.progress(step, 10_000, "note")
        if worker.preemption_requested():
            raise Preempted(step)
        time.sleep(0.01)


def receive_forever(pool: WorkerPool, messages: list) -> None:
    while True:
        connection.wait(pool.connections)
        messages += pool.receive()


def test_answers_of_all_ranks_in_order_job_after_job():
    pool = WorkerPool(2, TWO, {"COLOUR": "blue"})
    try:
        assert pool(describe, "one") == [(0, 2, "2", "blue", "one"), (1, 2, "2", "blue", "one")]
        assert [answer[-1] for answer in pool(describe, "two")] == ["two", "two"]
    finally:
        pool.close()
    assert "COLOUR" not in os.environ


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [("usage", UsageError, "a sentence"), ("death", RankFailed, "rank 1 died with exit code -9"),
     ("bug", RankFailed, "(?s)rank 1 failed.*ValueError: a reason")],
)  # fmt: skip
def test_one_rank_that_fails_ends_the_job_at_once(kind, error, says):
    pool, began = WorkerPool(2, TWO), time.monotonic()
    with pytest.raises(error, match=says):
        pool(fail, kind)
    assert time.monotonic() - began < 30  # the other rank would sleep for a minute


def test_two_pools_side_by_side_one_is_asked_to_stop():
    stays, stops = WorkerPool(1, TWO, {"COLOUR": "red"}), WorkerPool(1, TWO)
    try:
        stops.start(count_until_asked_to_stop)
        stays.start(describe, "done")
        while not stays.is_done:
            connection.wait([*stays.connections, *stops.connections])
            stays.receive()
            messages = stops.receive()
        connection.wait(stops.connections)
        messages = stops.receive()
        stops.terminate()
        with pytest.raises(Preempted) as stopped:
            receive_forever(stops, messages)
        steps = [done for done, total, note in messages]
        assert steps == sorted(steps)
        assert stopped.value.step >= steps[-1]
    finally:
        stays.close()
        stops.close(kill=True)
