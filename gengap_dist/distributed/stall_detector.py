"""A thread beside each rank that tells, when ranks wait too long, whom they wait for and where that one is.

Every rank's thread leaves word in the process group's store from time to time. When a rank has waited for longer than
`launch.stall_report_seconds`, its thread reads what all ranks said last; the first to notice speaks for all.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

from gengap_dist.distributed.phase_timer import CurrentPhase
from gengap_dist.distributed.process_group import World

STORE_SECONDS = 2.0  # for the store to answer when all is over


class Heartbeat(NamedTuple):
    """What a rank said last."""

    rank: int
    step: int
    activity: str
    seconds: float
    """How long it had been doing that."""
    num_collectives: int
    in_collective: bool
    at: float
    """time.time() when it said so; clocks of machines are taken to agree to a few seconds."""
    host: str
    pid: int


def diagnose(words: list[Heartbeat], missing: list[int], now: float, report_seconds: float) -> str:
    """One sentence: who is waited for, and in what.

    Args:
        words: the last of every rank that ever spoke.
        missing: ranks that never did.
        now: time.time().
        hang_seconds: how long the reader has waited.

    >>> def word(rank, count, activity, in_collective, at=100.0):
    ...     return Heartbeat(rank, 40, activity, 30.0, count, in_collective, at, "n0", 7)
    >>> diagnose([word(0, 81, "gradients", True), word(1, 80, "data", False)], [], 100.0, 30.0)
    'rank 0 waits in gradients (step 40) for rank 1 (n0, process 7), which has been in data (step 40) for 30 s'
    >>> diagnose([word(0, 81, "gradients", True), word(1, 80, "data", False, at=10.0)], [], 100.0, 30.0)[64:]
    'which was last heard of 90 s ago in data (step 40): it is gone, or its machine is'
    >>> diagnose([word(0, 81, "sum", True), word(1, 81, "sum", True)], [], 100.0, 30.0)
    'all ranks wait in sum (step 40) for each other: look at the network between them'
    """
    ahead = max(words, key=lambda word: word.num_collectives)
    behind = [w for w in words if w.num_collectives < ahead.num_collectives or now - w.at > max(report_seconds, 5)]
    waiting = [word.rank for word in words if word not in behind]
    where = f"in {ahead.activity} (step {ahead.step})"
    if not behind and not missing:
        return f"all ranks wait {where} for each other: look at the network between them"
    parts = [f"rank {_ranks(missing)}, which never said anything"] if missing else []
    for word in behind[:8]:
        silent = now - word.at
        place = f"{word.activity} (step {word.step})"
        fate = (
            f"was last heard of {silent:.0f} s ago in {place}: it is gone, or its machine is"
            if silent > max(report_seconds, 5)
            else f"has been in {place} for {word.seconds + silent:.0f} s"
        )
        parts.append(f"rank {word.rank} ({word.host}, process {word.pid}), which {fate}")
    more = f", and {len(behind) - 8} more" if len(behind) > 8 else ""
    return f"rank {_ranks(waiting)} waits {where} for " + "; and for ".join(parts) + more


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


class StallDetector:
    """The thread of one rank."""

    def __init__(self, world: World, hang_seconds: float) -> None:
        """Watch `world` from now on."""
        self.world, self.report_seconds = world, hang_seconds
        # The group's own store; torch has no public name for it.
        self.store = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
            "whereabouts", dist.distributed_c10d._get_default_store()
        )
        self._over = threading.Event()
        self._told = -1
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(min(self.report_seconds / 4, 15.0)):
            place = self.world.timer.current
            try:
                self._publish_heartbeat(place)
                waited = time.monotonic() - place.since
                if place.in_collective and waited > self.report_seconds and place.num_collectives > self._told:
                    self._told = place.num_collectives
                    if self.store.add(f"told/{place.num_collectives}", 1) == 1:
                        print(f"gengap: after {waited:.0f} s {self._diagnosis()}", file=sys.stderr, flush=True)
            except RuntimeError:  # the store went with the rank that held it; its launcher says so
                return

    def _publish_heartbeat(self, place: CurrentPhase) -> None:
        word = Heartbeat(
            self.world.rank,
            place.step,
            place.activity,
            time.monotonic() - place.since,
            place.num_collectives,
            place.in_collective,
            time.time(),
            socket.gethostname(),
            os.getpid(),
        )
        self.store.set(str(self.world.rank), json.dumps(word))

    def _diagnosis(self) -> str:
        ranks = range(self.world.size)
        there = [rank for rank in ranks if self.store.check([str(rank)])]
        words = [Heartbeat(*json.loads(self.store.get(str(rank)))) for rank in there]
        return diagnose(words, sorted(set(ranks) - set(there)), time.time(), self.report_seconds)

    def stop(self) -> None:
        """End the thread; one that asks a store on a machine that is gone may be waiting for many minutes yet."""
        self._over.set()
        self._thread.join(STORE_SECONDS)


@contextmanager
def detecting_stalls(world: World, report_seconds: float) -> Iterator[None]:
    """While open, whoever waits too long says for whom; one rank waits for nobody."""
    dog = StallDetector(world, report_seconds) if world.size > 1 else None
    try:
        yield
    finally:
        if dog:
            dog.stop()
