"""Whether this thread gets the processor time that it asks for, by the kernel's count of its waits."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import final

from gengap_dist.distributed.cores import Threads, available_cores

SCHEDSTAT = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds ready to run and waiting for one
MIN_SECONDS = 20.0  # of a window that is judged
LARGE_SHARE = 0.5


@final
class CpuWait:
    """Share of the time in which this thread was ready to run and waited for a core, since it was made."""

    def __init__(self, threads: Threads | None, tell: Callable[[str], None] | None = None) -> None:
        """A wait of no time yet.

        Args:
            threads: of this rank, for the warning.
            tell: called with the sentence in place of a warning.
        """
        self.threads = threads
        self._tell = tell or partial(warnings.warn, stacklevel=2)
        self._first = self._before = _read()
        self._time = time.monotonic()
        self._has_warned = False

    def share(self) -> float | None:
        """Waiting / (running + waiting) since the start, from 0 to 1; None if the kernel does not count."""
        return _share(self._first, _read())

    def warn_once(self) -> None:
        """Warn if this thread waited for more than half of the last MIN_SECONDS in which it was ready to run."""
        if self._has_warned or time.monotonic() - self._time < MIN_SECONDS:
            return
        now = _read()
        share = _share(self._before, now)
        self._before, self._time = now, time.monotonic()
        if share is not None and share > LARGE_SHARE:
            self._has_warned = True
            cores = available_cores()
            threads, remedy = "", "start fewer programs at once"
            if self.threads and self.threads.number > 1:
                threads = f", {self.threads.number} threads per rank"
                remedy += ", or set launch.threads_per_rank=1"
            self._tell(
                f"this run waits for a core {share:.0%} of the time, because other programs use the same cores "
                f"({cores.number:g}, limited by: {cores.source}{threads}): {remedy}"
            )


def _read() -> tuple[int, int] | None:
    """(running, waiting) in nanoseconds; None where the kernel does not say it."""
    try:
        running, waiting, _ = SCHEDSTAT.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return int(running), int(waiting)


def _share(before: tuple[int, int] | None, now: tuple[int, int] | None) -> float | None:
    """The share of waiting between two readings.

    >>> _share((10, 0), (30, 60)), _share(None, None)
    (0.75, None)
    """
    if before is None or now is None:
        return None
    running, waiting = (new - old for old, new in zip(before, now, strict=True))
    return waiting / (running + waiting) if running + waiting else 0.0
