"""What makes a comparison on one machine fair: contestants take turns, ratios are taken within a round, noise is named.

A machine's speed drifts, so a figure of one round is compared only with figures of the same round, and a ratio that the
machine's noise covers is not printed.
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

from gengap_dist.training.autotune.micro_batch import device_name

K = TypeVar("K")
V = TypeVar("V")

CONFIDENCE = 0.95
LEAST_ROUNDS = 6  # fewer give no interval of that confidence
MOST_SPREAD = 0.2


def orders(names: Sequence[K], num_rounds: int) -> Iterator[list[K]]:
    """Everybody's turn in each round: every round begins with the next one, so that nobody is always first.

    >>> list(orders("abc", 4))
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['a', 'b', 'c']]
    """
    for number in range(num_rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def in_turns(contestants: Mapping[K, Callable[[], V]], num_rounds: int) -> dict[K, list[V]]:
    """What each contestant's call returns, round by round; a bar on stderr says whose turn it is.

    The bar is drawn between turns only: no thread of it disturbs one.
    """
    found: dict[K, list[V]] = {name: [] for name in contestants}
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        turns = bar.add_task("", total=num_rounds * len(contestants))
        for names in orders(list(contestants), num_rounds):
            for name in names:
                bar.update(turns, description=str(name), refresh=True)
                found[name].append(contestants[name]())
                bar.advance(turns)
    return found


class Ratio(NamedTuple):
    """A ratio of figures of the same round, over rounds."""

    median: float
    low: float
    """Where the interval of the median begins, and `high` where it ends."""
    high: float
    doubt: str
    """Why it is not to be printed; empty if it is."""

    @property
    def told(self) -> bool:
        """Whether the noise leaves it standing."""
        return not self.doubt

    def __str__(self) -> str:
        """For a table: the interval stands there also where the ratio does not."""
        interval = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.median:.2f} ({interval})" if self.told else f"{self.doubt} ({interval})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with CONFIDENCE, whatever the distribution: from the k-th least to the k-th greatest of n.

    The median is outside of them with probability 2 P(Binomial(n, 1/2) < k), and k is the largest that keeps this below
    1 - CONFIDENCE (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2). Fewer than LEAST_ROUNDS: all of them.

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
    """`ours` / `theirs` in every round, unless the noise covers it.

    It is not told from 1 if the interval of the median holds 1, and too noisy if that is wider than MOST_SPREAD of the
    median; of fewer than LEAST_ROUNDS rounds nobody can say.

    >>> print(ratio([2.0, 2.02, 1.98, 2.0, 2.0, 2.02, 1.96, 0.7, 4.0], [1.0] * 9))
    2.00 (1.96 to 2.02)
    >>> print(ratio([1.01, 0.99, 1.03, 1.0, 0.98, 1.01], [1.0] * 6))
    not told from 1 (0.98 to 1.03)
    """
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    median, (low, high) = statistics.median(rounds), interval(rounds)
    doubt = ""
    if len(rounds) < LEAST_ROUNDS:
        doubt = "too few rounds"
    elif high - low > MOST_SPREAD * median:
        doubt = "too noisy"
    elif low <= 1 <= high:
        doubt = "not told from 1"
    return Ratio(median, low, high, doubt)


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, cores that this process may use, memory in GiB, GPUs, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def busy() -> float:
    """Share of the cores that others keep busy, over a second in which we sleep: noise that no spread may show."""
    return psutil.cpu_percent(interval=1.0) / 100


def in_words(machine: Mapping[str, Any]) -> str:
    """`machine` in a line.

    >>> in_words({"cpu": "A", "cores": 2, "memory_gib": 24.0, "gpus": ["B", "B"], "torch": "2", "python": "3"})
    'A, 2 cores, 24 GiB, 2 x B, torch 2, Python 3'
    """
    gpus = machine["gpus"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']:.0f} GiB"]
    parts += [f"{len(gpus)} x {gpus[0]}"] if gpus else []
    return ", ".join([*parts, f"torch {machine['torch']}", f"Python {machine['python']}"])
