"""What a measurement of activation spectra costs: seconds of forward passes, Gram matrices and decompositions.

From what was measured so far follows what is left. On a GPU kernels run behind the calls that start them, so that only
the sum of the parts is exact there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from gengap_dist.probes.progress import Progress, no_progress

PARTS = ("forward", "gram", "decomposition")


@dataclass
class _Part:
    seconds: float = 0.0
    done: float = 0.0
    planned: float = 0.0
    seconds_per_work: float | None = None
    """Before the first work is done."""

    def seconds_left(self) -> float:
        rate = self.seconds / self.done if self.done else self.seconds_per_work or 0.0
        return rate * max(0.0, self.planned - self.done)


@final
class MeasurementCost:
    """Seconds of a measurement by part, each without what runs inside it and belongs to another part."""

    def __init__(self, on_progress: Progress = no_progress, clock: Callable[[], float] = time.perf_counter) -> None:
        """No seconds of `clock` yet; `on_progress` gets those spent and the total estimated after each step."""
        self._clock = clock
        self._parts = {name: _Part() for name in PARTS}
        self._on_progress, self._nested_seconds = on_progress, 0.0
        self.is_watched = on_progress is not no_progress
        """Whether an estimate is wanted before all parts have begun."""

    def plan(self, part: str, work: float, seconds_per_work: float | None = None) -> None:
        """`work` will be done for a part, at this rate until the first of it is measured."""
        self._parts[part].planned += work
        self._parts[part].seconds_per_work = seconds_per_work

    @contextmanager
    def measured(self, part: str | None, work: float = 0.0) -> Iterator[None]:
        """While open, time counts for `part`; None: for no part. `work` of it is done at the end.

        >>> cost = MeasurementCost()
        >>> with cost.measured("forward"), cost.measured("gram"):
        ...     time.sleep(0.02)
        >>> cost.seconds()["gram"] >= 0.02 > cost.seconds()["forward"]
        True
        """
        began, outer_seconds = self._clock(), self._nested_seconds
        self._nested_seconds = 0.0
        try:
            yield
        finally:
            seconds = self._clock() - began
            if part is not None:
                self._parts[part].seconds += seconds - self._nested_seconds
                self._parts[part].done += work
            self._nested_seconds = outer_seconds + seconds
        if work:
            spent = sum(each.seconds for each in self._parts.values())
            self._on_progress(spent, spent + sum(each.seconds_left() for each in self._parts.values()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: part.seconds for name, part in self._parts.items()}
