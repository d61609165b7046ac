"""Paired timing on one machine: candidates take turns, ratios are computed within a round, with an interval.

The speed of a machine drifts, so a time is compared only with times of the same round. If the 95% interval of a ratio
contains 1 or is wider than 20% of the median, only the interval is shown.
"""

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from gengap_dist.distributed.cores import available_cores
from gengap_dist.training.autotune.micro_batch import device_name

K = TypeVar("K")
V = TypeVar("V")

CONFIDENCE = 0.95
MIN_ROUNDS = 6  # fewer rounds give no interval of that confidence
MAX_SPREAD = 0.2


def orders(names: Sequence[K], num_rounds: int) -> Iterator[list[K]]:
    """The order of candidates in each round: every round starts with the next candidate.

    >>> list(orders("abc", 4))
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['a', 'b', 'c']]
    """
    for number in range(num_rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def in_turns(candidates: Mapping[K, Callable[[], V]], num_rounds: int) -> dict[K, list[V]]:
    """The return values of each candidate, round by round; a bar on stderr shows the current candidate.

    The bar is drawn only between turns, without a thread, so it does not disturb the timing.
    """
    results: dict[K, list[V]] = {name: [] for name in candidates}
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        turns = bar.add_task("", total=num_rounds * len(candidates))
        for names in orders(list(candidates), num_rounds):
            for name in names:
                bar.update(turns, description=str(name), refresh=True)
                results[name].append(candidates[name]())
                bar.advance(turns)
    return results


class Ratio(NamedTuple):
    """A ratio of values of the same round: median and interval over rounds."""

    median: float
    low: float
    """Lower end of the interval of the median; `high` is the upper end."""
    high: float
    doubt: str
    """Why the median is not shown; empty if it is shown."""

    @property
    def is_conclusive(self) -> bool:
        """Whether the median is shown."""
        return not self.doubt

    def __str__(self) -> str:
        """For a table: the interval is always shown, the median only if it is conclusive."""
        interval = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.median:.2f} ({interval})" if self.is_conclusive else f"{self.doubt} ({interval})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Interval of the median with CONFIDENCE, for any distribution: from the k-th smallest to the k-th largest of n.

    The median is outside with probability 2 P(Binomial(n, 1/2) < k), and k is the largest that keeps this below
    1 - CONFIDENCE (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2). Fewer than MIN_ROUNDS: all of them.

    >>> interval([5, 1, 2, 3, 4, 6, 7, 8, 9])  # k = 2
    (2, 8)
    >>> interval([3, 1, 2])
    (1, 3)
    """
    n, ordered = len(values), sorted(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n // 2 + 1)]
    k = max(1, *(k for k, chance in enumerate(outside) if chance <= 1 - CONFIDENCE))
    return ordered[k - 1], ordered[-k]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio `ours` / `theirs` over rounds.

    It is inconclusive ("not told from 1") if the interval of the median contains 1, "too noisy" if it is wider than
    MAX_SPREAD of the median, and has "too few rounds" below MIN_ROUNDS.

    >>> print(ratio([2.0, 2.02, 1.98, 2.0, 2.0, 2.02, 1.96, 0.7, 4.0], [1.0] * 9))
    2.00 (1.96 to 2.02)
    >>> print(ratio([1.01, 0.99, 1.03, 1.0, 0.98, 1.01], [1.0] * 6))
    not told from 1 (0.98 to 1.03)
    """
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    median, (low, high) = statistics.median(rounds), interval(rounds)
    doubt = ""
    if len(rounds) < MIN_ROUNDS:
        doubt = "too few rounds"
    elif high - low > MAX_SPREAD * median:
        doubt = "too noisy"
    elif low <= 1 <= high:
        doubt = "not told from 1"
    return Ratio(median, low, high, doubt)


def machine() -> dict[str, Any]:
    """The machine of the measurements: processor, cores that this process may use, memory in GiB, GPUs, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": available_cores().whole,
        "memory_gib": round(memory, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def busy() -> float:
    """Share of the cores used by other processes, measured over one second of sleep."""
    return psutil.cpu_percent(interval=1.0) / 100


def machine_summary(machine: Mapping[str, Any]) -> str:
    """`machine` as one line.

    >>> machine_summary({"cpu": "A", "cores": 2, "memory_gib": 24.0, "gpus": ["B", "B"], "torch": "2", "python": "3"})
    'A, 2 cores, 24 GiB, 2 x B, torch 2, Python 3'
    """
    gpus = machine["gpus"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']:.0f} GiB"]
    parts += [f"{len(gpus)} x {gpus[0]}"] if gpus else []
    return ", ".join([*parts, f"torch {machine['torch']}", f"Python {machine['python']}"])
