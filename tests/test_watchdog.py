"""The thread that tells whom the ranks wait for."""

import os
import signal
import time
from pathlib import Path

from gengap_dist.watchdog import Watchdog
from tests.ranks import on_ranks


def test_a_store_that_no_longer_answers_does_not_hold_up_the_end():
    """The machine of rank 0, which holds the store, stands still: nothing is refused, nothing is answered."""
    _, (seconds, asks_still) = on_ranks(2, end_while_rank_0_stands_still)
    assert asks_still
    assert seconds < 20


def end_while_rank_0_stands_still(world):
    pid = world.agree(os.getpid())
    if world.rank == 0:
        world.barrier()
        os.kill(pid, signal.SIGSTOP)
        return None
    dog = Watchdog(world, hang_seconds=0.2)
    world.barrier()
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    with world.where.during("communication", "barrier", meeting=True):
        time.sleep(1.0)
    began = time.monotonic()
    dog.stop()
    out = time.monotonic() - began, dog._thread.is_alive()
    os.kill(pid, signal.SIGCONT)
    return out
