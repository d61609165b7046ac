"""Reports which rank blocks a collective, and in which phase.

On every rank a thread publishes a heartbeat in the process group's store at a regular interval. When a rank has waited
in a collective for longer than `launch.stall_report_seconds`, its thread reads the last heartbeat of every rank. The
first thread that does so prints the report for all ranks.
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

from gengap_dist.compat.default_store import default_store
from gengap_dist.distributed.phase_timer import CurrentPhase
from gengap_dist.distributed.process_group import World

JOIN_TIMEOUT_SECONDS = 2.0  # at the end, for a thread that may still wait for the store


class Heartbeat(NamedTuple):
    """The last published state of a rank."""

    rank: int
    step: int
    activity: str
    activity_seconds: float
    """Seconds since the activity began."""
    num_collectives: int
    in_collective: bool
    sent_at: float
    """time.time() at publication; the clocks of all machines must agree to within a few seconds."""
    host: str
    pid: int


def diagnose(heartbeats: list[Heartbeat], missing: list[int], now: float, report_seconds: float) -> str:
    """One sentence: which ranks block the collective, and in which phase they are.

    Args:
        heartbeats: the last heartbeat of each rank that has published one.
        missing: ranks that have not published any.
        now: time.time().
        report_seconds: launch.stall_report_seconds; a rank whose heartbeat is older than this (and than 5 s) is
            reported as silent.

    >>> def beat(rank, count, activity, in_collective, sent_at=100.0):
    ...     return Heartbeat(rank, 40, activity, 30.0, count, in_collective, sent_at, "n0", 7)
    >>> diagnose([beat(0, 81, "gradients", True), beat(1, 80, "data", False)], [], 100.0, 30.0)
    'rank 0 waits in gradients (step 40) for rank 1 (n0, process 7), which has been in data (step 40) for 30 s'
    >>> diagnose([beat(0, 81, "gradients", True), beat(1, 80, "data", False, sent_at=10.0)], [], 100.0, 30.0)[64:]
    'which sent its last heartbeat 90 s ago in data (step 40): the process or its machine is down'
    >>> diagnose([beat(0, 81, "sum", True), beat(1, 81, "sum", True)], [], 100.0, 30.0)
    'all ranks wait in sum (step 40) for each other: check the network between them'
    """
    max_silence = max(report_seconds, 5)
    ahead = max(heartbeats, key=lambda beat: beat.num_collectives)
    behind = [b for b in heartbeats if b.num_collectives < ahead.num_collectives or now - b.sent_at > max_silence]
    waiting = [beat.rank for beat in heartbeats if beat not in behind]
    collective = f"in {ahead.activity} (step {ahead.step})"
    if not behind and not missing:
        return f"all ranks wait {collective} for each other: check the network between them"
    blocking = [f"rank {_ranks(missing)}, which has sent no heartbeat"] if missing else []
    for beat in behind[:8]:
        silent = now - beat.sent_at
        phase = f"{beat.activity} (step {beat.step})"
        state = (
            f"sent its last heartbeat {silent:.0f} s ago in {phase}: the process or its machine is down"
            if silent > max_silence
            else f"has been in {phase} for {beat.activity_seconds + silent:.0f} s"
        )
        blocking.append(f"rank {beat.rank} ({beat.host}, process {beat.pid}), which {state}")
    more = f", and {len(behind) - 8} more" if len(behind) > 8 else ""
    return f"rank {_ranks(waiting)} waits {collective} for " + "; and for ".join(blocking) + more


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


class StallDetector:
    """The thread that publishes heartbeats and reports stalls, on one rank."""

    def __init__(self, world: World, report_seconds: float) -> None:
        """Start the thread."""
        self.world, self.report_seconds = world, report_seconds
        self.store = dist.PrefixStore("stall_detector", default_store())  # pyright: ignore[reportPrivateImportUsage]
        self._stop_requested = threading.Event()
        self._last_reported = -1
        self._thread = threading.Thread(target=self._run, name="stall_detector", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop_requested.wait(min(self.report_seconds / 4, 15.0)):
            phase = self.world.timer.current
            try:
                self._publish_heartbeat(phase)
                waited = time.monotonic() - phase.since
                if phase.in_collective and waited > self.report_seconds and phase.num_collectives > self._last_reported:
                    self._last_reported = phase.num_collectives
                    if self.store.add(f"reported/{phase.num_collectives}", 1) == 1:  # first rank to report this one
                        print(f"gengap: after {waited:.0f} s {self._diagnosis()}", file=sys.stderr, flush=True)
            except RuntimeError:  # the rank that hosts the store has ended; its launcher reports that
                return

    def _publish_heartbeat(self, phase: CurrentPhase) -> None:
        heartbeat = Heartbeat(
            self.world.rank,
            phase.step,
            phase.activity,
            time.monotonic() - phase.since,
            phase.num_collectives,
            phase.in_collective,
            time.time(),
            socket.gethostname(),
            os.getpid(),
        )
        self.store.set(str(self.world.rank), json.dumps(heartbeat))

    def _diagnosis(self) -> str:
        ranks = range(self.world.size)
        published = [rank for rank in ranks if self.store.check([str(rank)])]
        heartbeats = [Heartbeat(*json.loads(self.store.get(str(rank)))) for rank in published]
        return diagnose(heartbeats, sorted(set(ranks) - set(published)), time.time(), self.report_seconds)

    def stop(self) -> None:
        """Stop the thread. If the store's machine is down, the thread may block for minutes: it is not waited for."""
        self._stop_requested.set()
        self._thread.join(JOIN_TIMEOUT_SECONDS)


@contextmanager
def detecting_stalls(world: World, report_seconds: float) -> Iterator[None]:
    """Context in which stalled collectives are reported; with one rank it does nothing."""
    detector = StallDetector(world, report_seconds) if world.size > 1 else None
    try:
        yield
    finally:
        if detector:
            detector.stop()
