"""Paired comparison of arms: same seed, same initialisation, same order seed; only the arm differs.

scipy takes a second to import, and one run alone has nothing to compare: it is imported where it is needed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8  # with which a detectable difference is found
NUM_RESAMPLES = 9999


class Paired(NamedTuple):
    """Mean of paired differences, with two intervals: which to trust is in the note of `paired`."""

    mean: float
    bootstrap: tuple[float, float] | None
    """95% bootstrap over pairs; None for fewer than two pairs."""
    student: tuple[float, float] | None
    """95% Student t interval; None for fewer than two pairs, and where equal differences give no spread to judge by."""
    differences: dict[int, float]
    """Seed to difference."""


def paired(baseline: Mapping[int, float], arm: Mapping[int, float]) -> Paired:
    """Baseline minus arm over the seeds that both have.

    The bootstrap takes expanded percentiles (Hesterberg 2015, The American Statistician 69:371): those at
    Phi(-sqrt(n / (n - 1)) t_{0.975, n-1}) and its mirror, not at 0.025 and 0.975, which are too narrow by as much as
    the spread of few values is too small. It assumes nothing, but cannot reach beyond the smallest and largest
    difference: of normal differences it covers the truth in 77% of cases with 3 pairs, 92% with 5, 94% with 8. The t
    interval assumes normal differences and keeps its 95% for any n. For fewer than 8 pairs read the t interval.

    Raises:
        ValueError: if no seed is in both.

    >>> result = paired({0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.8, 1: 0.7, 2: 0.75})
    >>> round(result.mean, 9), sorted(result.differences)
    (0.1, [0, 1, 2])
    """
    by_seed = differences(baseline, arm)
    if not by_seed:
        raise ValueError("no seed was run by both arms: run the same seeds for all arms")
    values = np.array([*by_seed.values()])
    bootstrap = None
    if (n := len(values)) > 1:
        from scipy import stats

        tail = float(stats.norm.cdf(-((n / (n - 1)) ** 0.5) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)))
        drawn = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            confidence_level=1 - 2 * tail,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        bootstrap = (float(drawn.low), float(drawn.high))
    student = None if p_value(values) is None else t_interval(values)
    return Paired(float(values.mean()), bootstrap, student, by_seed)


def differences(baseline: Mapping[int, float], arm: Mapping[int, float]) -> dict[int, float]:
    """Baseline minus arm, of the seeds that both have, in order.

    >>> differences({0: 3.0, 1: 5.0, 2: 1.0}, {1: 1.0, 0: 1.0, 7: 0.0})
    {0: 2.0, 1: 4.0}
    """
    return {seed: baseline[seed] - arm[seed] for seed in sorted(baseline.keys() & arm.keys())}


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The mean -+ t_{(1 + confidence) / 2, n-1} sd / sqrt(n), sd with n - 1; None for fewer than two values.

    >>> [round(end, 6) for end in t_interval([1.0, 3.0])]  # t = 12.7062, sd / sqrt(n) = 1
    [-10.706205, 14.706205]
    """
    n = len(values)
    if n < 2:
        return None
    mean, half = float(np.mean(values)), float(t_half(values, confidence))
    return (mean - half, mean + half)


def t_half(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Half of the t interval over the first axis, [n, ...] to [...], n > 1.

    >>> t_half(np.array([[1.0, 10.0], [3.0, 30.0]])).round(4)
    array([ 12.7062, 127.062 ])
    """
    from scipy import stats

    n = len(values)
    return stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, axis=0, ddof=1) / n**0.5


def p_value(values: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p of Student's t test that the mean is 0; None where equal or fewer than two values give no spread.

    >>> round(p_value([1.0, 3.0]), 6)  # t = 2 with one degree of freedom
    0.295167
    >>> p_value([1.0, 1.0]), p_value([1.0])
    (None, None)
    """
    n = len(values)
    if n < 2 or np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return None
    from scipy import stats

    t = float(np.mean(values)) / (float(np.std(values, ddof=1)) / n**0.5)
    return float(2 * stats.t.sf(abs(t), n - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P values corrected for their number (Holm 1979): p_(i) becomes min(1, max over j <= i of (m - j + 1) p_(j)).

    Where all are compared with 0.05, the chance of one or more false alarms is 5%. None stays None and is not counted.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    found = sorted((p, at) for at, p in enumerate(ps) if p is not None)
    out: list[float | None] = [None] * len(ps)
    highest = 0.0
    for number, (p, at) in enumerate(found):
        highest = max(highest, min(1.0, (len(found) - number) * p))
        out[at] = highest
    return out


def minimum_detectable_effect(deviation: float, num_pairs: int) -> float:
    """The true difference that the two-sided paired t test at 5% finds with a power of 80%; nan below two pairs.

    It solves P(T > t_{0.975, n-1}) = 0.8 for d, where T is noncentral t with d sqrt(n) / deviation (the other tail has
    less than 1e-4 there).

    >>> round(minimum_detectable_effect(1.0, 3), 2), round(minimum_detectable_effect(1.0, 16), 2)
    (3.26, 0.75)
    """
    if num_pairs < 2 or not deviation > 0:
        return float("nan") if num_pairs < 2 else 0.0
    from scipy import optimize, stats

    df, limit = num_pairs - 1, stats.t.ppf((1 + CONFIDENCE) / 2, num_pairs - 1)

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(limit, df, shift)) - POWER

    return optimize.root_scalar(lacking, bracket=(0.0, 20.0)).root * deviation / num_pairs**0.5


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; the deviation of one value is nan.

    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else float("nan")


Interval = tuple[float, float]
