"""What torch's profiler recorded on one rank: operators, what ranks do at the same time, and the file."""

import gzip
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PREFIX = "gengap/"  # of our own ranges
STEP = PREFIX + "step "
MAX_OPERATORS = 10  # operators in a summary

Intervals = list[tuple[float, float]]
"""Microseconds from and to; ascending, none touching the next."""


class Trace:
    """The steps among a profiler's events; what was due between them is left out."""

    def __init__(self, events: Iterable[Any]) -> None:
        """Of torch's FunctionEvents.

        A GPU's events are left out: an operator knows the kernels that it launched, whenever they ran, and a range
        comes again as one of the GPU, from the first of its kernels to the last.
        """
        events = list(events)
        self._on_gpu = any(_on_gpu(event) for event in events)
        on_host = [event for event in events if not _on_gpu(event)]
        self._spans = union(_span(event) for event in on_host if event.name.startswith(STEP))
        self.num_steps = len(self._spans)
        self._events = [event for event in on_host if intersection([_start(event)], self._spans)]

    def operators(self) -> list[tuple[str, float, float]]:
        """Name, calls in a step and milliseconds of its own in a step, the dearest first, the rest as one.

        On a GPU the time is that of the kernels it launched.
        """
        calls: Counter[str] = Counter()
        spent: defaultdict[str, float] = defaultdict(float)
        for event in self._events:
            if _is_operator(event):
                calls[event.name] += 1
                spent[event.name] += _kernels(event) if self._on_gpu else event.self_cpu_time_total
        each = 1 / max(1, self.num_steps)
        found = sorted(((name, calls[name] * each, us / 1000 * each) for name, us in spent.items()), key=_cost)
        others = found[MAX_OPERATORS:]
        rest = [(f"{len(others)} others", sum(o[1] for o in others), sum(o[2] for o in others))] if others else []
        return found[:MAX_OPERATORS] + rest

    def exposed_communication(self, part: str) -> float:
        """Milliseconds in a step in which, within this part, ranks met and no operator ran beside that; CPU."""
        inside = union(_span(event) for event in self._events if event.name == PREFIX + part)
        # what began outside is not this part's: word on whether to leave crosses while a step computes
        meets = (_span(event) for event in self._events if event.is_async and intersection([_start(event)], inside))
        meeting = intersection(union(meets), inside)
        busy = union(_span(e) for e in self._events if _is_operator(e) and not e.cpu_children and "c10d" not in e.name)
        return (total_length(meeting) - total_length(intersection(meeting, busy))) / 1000 / max(1, self.num_steps)


def export(profiler: Any, path: Path) -> str | None:
    """Write the profiler's trace, whole or not at all; what went wrong, if something did."""
    raw, part = path.with_name(f".{path.stem}.part"), path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        raw.touch()
        profiler.export_chrome_trace(str(raw))
        with raw.open("rb") as source:
            source.seek(max(0, raw.stat().st_size - 64))
            if not source.read().rstrip().endswith(b"}"):
                return "no room for the whole trace"  # kineto does not say
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
    """A moment, as the shortest of intervals."""
    return event.time_range.start, event.time_range.start + 1e-3


def _cost(operator: tuple[str, float, float]) -> tuple[float, str]:
    return -operator[2], operator[0]


def _on_gpu(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _kernels(event: Any) -> float:
    """Microseconds of the kernels that an operator launched; torch counts a range's copy on the GPU as one of them."""
    copies = (kernel for kernel in event.kernels if event.is_user_annotation and kernel.name == event.name)
    return event.self_device_time_total - sum(copy.duration for copy in copies)


def _is_operator(event: Any) -> bool:
    """Work, and not a range around it: those of torch, DeepSpeed and ours hold Python and waiting. Compiled code is."""
    return not event.is_async and (not event.is_user_annotation or "ompiled" in event.name)


def union(spans: Iterable[tuple[float, float]]) -> Intervals:
    """Their union.

    >>> merged([(4, 6), (0, 2), (1, 3)])
    [(0, 3), (4, 6)]
    """
    out: Intervals = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def intersection(these: Intervals, those: Intervals) -> Intervals:
    """What lies in both.

    >>> common([(0, 3), (4, 6)], [(1, 5)])
    [(1, 3), (4, 5)]
    """
    out: Intervals = []
    i = j = 0
    while i < len(these) and j < len(those):
        start, end = max(these[i][0], those[j][0]), min(these[i][1], those[j][1])
        if start < end:
            out.append((start, end))
        if these[i][1] < those[j][1]:
            i += 1
        else:
            j += 1
    return out


def total_length(spans: Sequence[tuple[float, float]]) -> float:
    """Their lengths, summed."""
    return sum(end - start for start, end in spans)
