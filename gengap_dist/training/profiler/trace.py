"""Analyses and writes the events that torch's profiler recorded on one rank: operators, communication, trace file."""

import gzip
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PREFIX = "gengap/"  # of this package's ranges
STEP = PREFIX + "step "
MAX_OPERATORS = 10  # in a summary

Intervals = list[tuple[float, float]]
"""Start and end in microseconds; ascending and disjoint."""


class Trace:
    """The profiler events within steps; events between steps are ignored."""

    def __init__(self, events: Iterable[Any]) -> None:
        """From torch's FunctionEvents.

        GPU events are ignored: an operator has the kernels that it launched, and a range appears a second time as a GPU
        event, from its first kernel to its last.
        """
        events = list(events)
        self._on_gpu = any(_on_gpu(event) for event in events)
        on_host = [event for event in events if not _on_gpu(event)]
        self._spans = union(_span(event) for event in on_host if event.name.startswith(STEP))
        self.num_steps = len(self._spans)
        self._events = [event for event in on_host if intersection([_start(event)], self._spans)]

    def operators(self) -> list[tuple[str, float, float]]:
        """Name, calls per step and self milliseconds per step, the most expensive first, the others as one entry.

        On a GPU the time is that of the launched kernels.
        """
        calls: Counter[str] = Counter()
        spent: defaultdict[str, float] = defaultdict(float)
        for event in self._events:
            if _is_operator(event):
                calls[event.name] += 1
                spent[event.name] += _kernels(event) if self._on_gpu else event.self_cpu_time_total
        per_step = 1 / max(1, self.num_steps)
        operators = sorted(
            ((name, calls[name] * per_step, us / 1000 * per_step) for name, us in spent.items()), key=_cost
        )
        others = operators[MAX_OPERATORS:]
        rest = [(f"{len(others)} others", sum(o[1] for o in others), sum(o[2] for o in others))] if others else []
        return operators[:MAX_OPERATORS] + rest

    def exposed_communication(self, part: str) -> float:
        """Milliseconds per step of collectives within `part` during which no operator ran; CPU only."""
        inside = union(_span(event) for event in self._events if event.name == PREFIX + part)
        # collectives started outside do not count: the preemption flag is reduced during a step
        collectives = (
            _span(event) for event in self._events if event.is_async and intersection([_start(event)], inside)
        )
        communication = intersection(union(collectives), inside)
        busy = union(_span(e) for e in self._events if _is_operator(e) and not e.cpu_children and "c10d" not in e.name)
        return (
            (total_length(communication) - total_length(intersection(communication, busy)))
            / 1000
            / max(1, self.num_steps)
        )


def export(profiler: Any, path: Path) -> str | None:
    """Write the profiler's trace atomically; returns the error, or None."""
    raw, part = path.with_name(f".{path.stem}.part"), path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        raw.touch()
        profiler.export_chrome_trace(str(raw))
        with raw.open("rb") as source:
            source.seek(max(0, raw.stat().st_size - 64))
            if not source.read().rstrip().endswith(b"}"):
                return "not enough disk space for the trace"  # kineto does not report it
            source.seek(0)
            with gzip.open(part, "wb", compresslevel=4) as target:
                shutil.copyfileobj(source, target)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        return str(getattr(error, "strerror", None) or error)
    finally:
        for left in (raw, part):
            _remove(left)
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _start(event: Any) -> tuple[float, float]:
    """The start of an event, as a very short interval."""
    return event.time_range.start, event.time_range.start + 1e-3


def _cost(operator: tuple[str, float, float]) -> tuple[float, str]:
    return -operator[2], operator[0]


def _on_gpu(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _kernels(event: Any) -> float:
    """Microseconds of the kernels that an operator launched, without the GPU copy of a range, which torch includes."""
    copies = (kernel for kernel in event.kernels if event.is_user_annotation and kernel.name == event.name)
    return event.self_device_time_total - sum(copy.duration for copy in copies)


def _is_operator(event: Any) -> bool:
    """Whether the event is an operator or compiled code; ranges of torch, DeepSpeed and ours include waiting."""
    return not event.is_async and (not event.is_user_annotation or "ompiled" in event.name)


def union(spans: Iterable[tuple[float, float]]) -> Intervals:
    """The union of intervals.

    >>> union([(4, 6), (0, 2), (1, 3)])
    [(0, 3), (4, 6)]
    """
    out: Intervals = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def intersection(first: Intervals, second: Intervals) -> Intervals:
    """The intersection of two lists of intervals.

    >>> intersection([(0, 3), (4, 6)], [(1, 5)])
    [(1, 3), (4, 5)]
    """
    out: Intervals = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            out.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return out


def total_length(spans: Sequence[tuple[float, float]]) -> float:
    """The sum of the lengths."""
    return sum(end - start for start, end in spans)
