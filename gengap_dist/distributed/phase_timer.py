"""The current phase of a rank, and seconds per phase. The main thread writes it; the stall detector reads it.

Time is split into `PHASES`. On a GPU the host runs ahead of the device, so CUDA events on the device's stream are used
instead of the host's clock.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

NO_SPAN = nullcontext()
PHASES = ("data", "compute", "communication", "probe", "evaluation", "checkpoint")


class CurrentPhase(NamedTuple):
    """What a rank does now."""

    step: int
    activity: str
    since: float
    """time.monotonic() when the activity began."""
    num_collectives: int
    """Number of collectives entered; a rank with fewer than the others blocks them."""
    in_collective: bool
    """Whether the activity is a collective."""


class PhaseTimer:
    """Measures the time of each phase on one rank."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        """Start the clock in no phase; `on_gpu`: time by CUDA events."""
        self.current = CurrentPhase(0, "starting", time.monotonic(), 0, False)
        self.step = 0
        self.failed_phase: CurrentPhase | None = None
        """The phase in which the current exception was raised; None if it was outside all phases."""
        self._on_gpu = on_gpu
        self._open_phases = ["other"]
        self._intervals: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._mark = self.now()

    def now(self) -> Any:
        """The current time: seconds, or an event on the GPU's current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, kind: str, activity: str = "", *, collective: bool = False) -> Iterator[None]:
        """Context whose time is charged to phase `kind` and not to the enclosing one.

        Args:
            kind: one of `PHASES`.
            activity: shown in stall reports; `kind` if empty.
            collective: whether this is a collective, in which the rank waits for the others.
        """
        before = self.current
        self.current = CurrentPhase(
            self.step,
            activity or kind,
            time.monotonic(),
            before.num_collectives + collective,
            collective or before.in_collective,
        )
        self._charge(self._open_phases[-1], self.now())
        self._open_phases.append(kind)
        self.failed_phase = None
        try:
            yield
            self.failed_phase = None
        except BaseException:
            self.failed_phase = self.failed_phase or self.current
            raise
        finally:
            self._charge(self._open_phases.pop(), self.now())
            self.current = before._replace(since=time.monotonic(), num_collectives=self.current.num_collectives)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Context for a part of compute: `forward`, `backward` or `optimizer`. Only the profiler measures these."""
        return NO_SPAN

    def enter_collective(self, activity: str) -> None:
        """Mark that the rest of the current phase waits for the other ranks."""
        self.current = CurrentPhase(self.step, activity, time.monotonic(), self.current.num_collectives + 1, True)

    def charge_since(self, moment: Any, kind: str) -> None:
        """Charge the time since `moment` to `kind` instead of the current phase."""
        self._charge(self._open_phases[-1], moment)
        self._charge(kind, self.now())

    def _charge(self, kind: str, until: Any) -> None:
        if kind in self._seconds:
            if self._on_gpu:
                self._intervals.append((kind, self._mark, until))
            else:
                self._seconds[kind] += until - self._mark
        self._mark = until

    def pop_seconds(self) -> list[float]:
        """Seconds per phase since the last call, in the order of `PHASES`.

        >>> timer = PhaseTimer()
        >>> with timer.phase("probe"), timer.phase("communication", "sum", collective=True):
        ...     time.sleep(0.02)
        >>> data, compute, communication, probe, *_ = timer.pop_seconds()
        >>> data == compute == 0, communication >= 0.02 > probe > 0, timer.current.num_collectives
        (True, True, 1)
        """
        self._charge(self._open_phases[-1], self.now())
        if self._intervals and not self._mark.query():  # the last event on the stream
            self._mark.synchronize()
        for kind, start, end in self._intervals:
            self._seconds[kind] += start.elapsed_time(end) / 1000
        self._intervals.clear()
        out = [self._seconds[kind] for kind in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return out
