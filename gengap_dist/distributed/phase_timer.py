"""What a rank is doing, and how long it took: one notebook that the main thread writes and a watchdog reads.

Time is split into what it went to (`KINDS`). On a GPU the host runs ahead of the device, so events on the device's
stream are timed there instead of the host's clock.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

NOTHING = nullcontext()
KINDS = ("data", "compute", "communication", "probe", "evaluation", "checkpoint")


class Place(NamedTuple):
    """Where a rank is."""

    step: int
    doing: str
    since: float
    """time.monotonic() of its beginning."""
    num_collectives: int
    """How many times it has met the other ranks, or tried to; the one that lags behind is the one waited for."""
    waiting: bool
    """Whether what it does is to meet the others."""


class Whereabouts:
    """One rank's notebook."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        """An empty notebook; the clock starts."""
        self.place = Place(0, "starting", time.monotonic(), 0, False)
        self.step = 0
        self.trouble: Place | None = None
        """Where the exception that is on its way began, if that was anywhere."""
        self._on_gpu = on_gpu
        self._kinds = ["other"]
        self._intervals: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
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
    def during(self, kind: str, doing: str = "", *, meeting: bool = False) -> Iterator[None]:
        """While open, time goes to `kind` and not to what is around it; `meeting`: the other ranks are waited for."""
        before = self.place
        self.place = Place(
            self.step, doing or kind, time.monotonic(), before.num_collectives + meeting, meeting or before.waiting
        )
        self._charge(self._kinds[-1], self.now())
        self._kinds.append(kind)
        self.trouble = None
        try:
            yield
            self.trouble = None
        except BaseException:
            self.trouble = self.trouble or self.place
            raise
        finally:
            self._charge(self._kinds.pop(), self.now())
            self.place = before._replace(since=time.monotonic(), num_collectives=self.place.num_collectives)

    def part(self, name: str) -> AbstractContextManager[None]:
        """Around a part of computing, `forward`, `backward` or `optimizer`: only a profile tells them apart."""
        return NOTHING

    def meet(self, doing: str) -> None:
        """Say that what follows, within what is going on already, waits for the other ranks."""
        self.place = Place(self.step, doing, time.monotonic(), self.place.num_collectives + 1, True)

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

    def take(self) -> list[float]:
        """Seconds per kind since the last call, in the order of `KINDS`.

        >>> where = Whereabouts()
        >>> with where.during("probe"), where.during("communication", "sum", meeting=True):
        ...     time.sleep(0.02)
        >>> data, compute, communication, probe, *_ = where.take()
        >>> data == compute == 0, communication >= 0.02 > probe > 0, where.place.num_collectives
        (True, True, 1)
        """
        self._charge(self._kinds[-1], self.now())
        if self._intervals and not self._mark.query():  # behind all others on the stream
            self._mark.synchronize()
        for kind, start, end in self._intervals:
            self._seconds[kind] += start.elapsed_time(end) / 1000
        self._intervals.clear()
        out = [self._seconds[kind] for kind in KINDS]
        self._seconds = dict.fromkeys(KINDS, 0.0)
        return out
