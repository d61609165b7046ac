"""Ranks that stay: what they answer, and how they end."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from typing import Any

import psutil
import pytest

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed import cgroups
from gengap_dist.distributed.cores import Threads
from gengap_dist.distributed.launchers.local import LocalLauncher
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.distributed.worker_pool import RankFailed, Worker, WorkerPool
from gengap_dist.errors import UsageError
from tests.ray_cluster import ROOT, until

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
    [("usage", UsageError, "a sentence"), ("death", RankFailed, r"rank 1 died with exit code -9 \(SIGKILL\)$"),
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


def test_a_rank_that_was_killed_for_lack_of_memory_says_so(tmp_path, monkeypatch):
    events = tmp_path / "memory.events"
    (tmp_path / "cgroup").write_text("0::/\n")
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(cgroups, "MEMBERSHIPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "GROUPS", tmp_path)
    pool = WorkerPool(2, TWO)
    pool.start(fail, "death")
    events.write_text("low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
    with pytest.raises(RankFailed, match=r"exit code -9 \(SIGKILL\); .* for lack of memory, so that may be the reason"):
        receive_forever(pool, [])
    pool.close(kill=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_a_signal_while_ranks_start_is_an_orderly_end(tmp_path, monkeypatch, number):
    """At the driver and at its ranks at once, as from a terminal that is closed or a scheduler."""
    launcher, start = LocalLauncher(2, f"{__name__}:count_until_asked_to_stop"), WorkerPool.start

    def interrupted(pool: WorkerPool, *job: Any) -> None:
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(number)
        os.kill(os.getpid(), number)
        start(pool, *job)

    monkeypatch.setattr(WorkerPool, "start", interrupted)
    with pytest.raises(Preempted, match=r"preempted before or after training. Continue with --resume."):
        launcher.run(RunConfig(), tmp_path, resume=False, progress=print)


def test_ranks_end_with_the_process_that_started_them():
    """Also those that are in the middle of a step, and tell it nothing."""
    code = (
        "from gengap_dist.distributed.worker_pool import WorkerPool\n"
        "from tests.distributed.test_worker_pool import TWO, sleep_and_say\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(2, TWO)\n"
        "    pool.start(sleep_and_say)\n"
        "    for pipe in pool.connections: print(pipe.recv()[1], flush=True)\n"
        "    pool.connections[0].recv()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as driver:
        assert driver.stdout
        ranks = [psutil.Process(int(driver.stdout.readline())) for _ in range(2)]
        driver.kill()
    until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), 10)


def sleep_and_say(worker: Worker) -> None:
    worker.send(os.getpid())
    time.sleep(60)
