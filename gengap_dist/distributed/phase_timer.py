"""What a rank is doing, and how long it took: one notebook that the main thread writes and a watchdog reads.

Time is split into what it went to (`KINDS`). On a GPU the host runs ahead of the device, so events on the device's
stream are timed there instead of the host's clock.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

NO_SPAN = nullcontext()
PHASES = ("data", "compute", "communication", "probe", "evaluation", "checkpoint")


class CurrentPhase(NamedTuple):
    """Where a rank is."""

    step: int
    activity: str
    since: float
    """time.monotonic() of its beginning."""
    num_collectives: int
    """How many times it has met the other ranks, or tried to; the one that lags behind is the one waited for."""
    in_collective: bool
    """Whether what it does is to meet the others."""


class PhaseTimer:
    """One rank's notebook."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        """An empty notebook; the clock starts."""
        self.current = CurrentPhase(0, "starting", time.monotonic(), 0, False)
        self.step = 0
        self.failed_phase: CurrentPhase | None = None
        """Where the exception that is on its way began, if that was anywhere."""
        self._on_gpu = on_gpu
        self._kinds = ["other"]
        self._intervals: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._mark = self.now()

    def now(self) -> Any:
        """A moment: seconds, or an event on the GPU's current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, kind: str, doing: str = "", *, meeting: bool = False) -> Iterator[None]:
        """While open, time goes to `kind` and not to what is around it; `meeting`: the other ranks are waited for."""
        before = self.current
        self.current = CurrentPhase(
            self.step,
            doing or kind,
            time.monotonic(),
            before.num_collectives + meeting,
            meeting or before.in_collective,
        )
        self._charge(self._kinds[-1], self.now())
        self._kinds.append(kind)
        self.failed_phase = None
        try:
            yield
            self.failed_phase = None
        except BaseException:
            self.failed_phase = self.failed_phase or self.current
            raise
        finally:
            self._charge(self._kinds.pop(), self.now())
            self.current = before._replace(since=time.monotonic(), num_collectives=self.current.num_collectives)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Around a part of computing, `forward`, `backward` or `optimizer`: only a profile tells them apart."""
        return NO_SPAN

    def enter_collective(self, doing: str) -> None:
        """Say that what follows, within what is going on already, waits for the other ranks."""
        self.current = CurrentPhase(self.step, doing, time.monotonic(), self.current.num_collectives + 1, True)

    def charge_since(self, moment: Any, kind: str) -> None:
        """Charge the time since `moment`, of what is going on, to `kind`."""
        self._charge(self._kinds[-1], moment)
        self._charge(kind, self.now())

    def _charge(self, kind: str, until: Any) -> None:
        if kind in self._seconds:
            if self._on_gpu:
                self._intervals.append((kind, self._mark, until))
            else:
                self._seconds[kind] += until - self._mark
        self._mark = until

    def pop_seconds(self) -> list[float]:
        """Seconds per kind since the last call, in the order of `KINDS`.

        >>> where = PhaseTimer()
        >>> with where.phase("probe"), where.phase("communication", "sum", meeting=True):
        ...     time.sleep(0.02)
        >>> data, compute, communication, probe, *_ = where.pop_seconds()
        >>> data == compute == 0, communication >= 0.02 > probe > 0, where.current.num_collectives
        (True, True, 1)
        """
        self._charge(self._kinds[-1], self.now())
        if self._intervals and not self._mark.query():  # behind all others on the stream
            self._mark.synchronize()
        for kind, start, end in self._intervals:
            self._seconds[kind] += start.elapsed_time(end) / 1000
        self._intervals.clear()
        out = [self._seconds[kind] for kind in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return out
