"""Paired comparison of arms: runs with the same seed share initialisation and sample order; only the arm differs.

scipy takes a second to import and a single run does not need it, so functions import it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8  # of the test that defines the minimum detectable effect
NUM_RESAMPLES = 9999


class Paired(NamedTuple):
    """Mean of paired differences, with two confidence intervals; `paired` explains which to use."""

    mean: float
    bootstrap: tuple[float, float] | None
    """95% bootstrap over pairs; None for fewer than two pairs."""
    student: tuple[float, float] | None
    """95% Student t interval; None for fewer than two pairs, and if all differences are equal."""
    differences: dict[int, float]
    """Seed to difference."""


def paired(baseline: Mapping[int, float], arm: Mapping[int, float]) -> Paired:
    """Mean of baseline minus arm over the common seeds, with intervals.

    The bootstrap uses expanded percentiles (Hesterberg 2015, The American Statistician 69:371), p =
    Phi(-sqrt(n / (n - 1)) t_{0.975, n-1}) and 1 - p. The usual 0.025 and 0.975 give too narrow intervals for small n,
    because the standard deviation of few values is too small. The bootstrap assumes no distribution, but cannot extend
    beyond the smallest and the largest difference: for normal differences it covers the true mean in 77% of cases with
    3 pairs, 92% with 5, 94% with 8. The t interval assumes normal differences and covers 95% for any n. For fewer than
    8 pairs use the t interval.

    Raises:
        ValueError: if there is no common seed.

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
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            confidence_level=1 - 2 * tail,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        bootstrap = (float(interval.low), float(interval.high))
    student = None if p_value(values) is None else t_interval(values)
    return Paired(float(values.mean()), bootstrap, student, by_seed)


def differences(baseline: Mapping[int, float], arm: Mapping[int, float]) -> dict[int, float]:
    """Seed to baseline minus arm, for the common seeds in ascending order.

    >>> differences({0: 3.0, 1: 5.0, 2: 1.0}, {1: 1.0, 0: 1.0, 7: 0.0})
    {0: 2.0, 1: 4.0}
    """
    return {seed: baseline[seed] - arm[seed] for seed in sorted(baseline.keys() & arm.keys())}


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Confidence interval mean -+ t_{(1 + confidence) / 2, n-1} sd / sqrt(n), sd with n - 1; None for n < 2.

    >>> [round(end, 6) for end in t_interval([1.0, 3.0])]  # t = 12.7062, sd / sqrt(n) = 1
    [-10.706205, 14.706205]
    """
    n = len(values)
    if n < 2:
        return None
    mean, half_width = float(np.mean(values)), float(t_half_width(values, confidence))
    return (mean - half_width, mean + half_width)


def t_half_width(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Half width of the t interval over the first axis, [n, ...] to [...], n > 1.

    >>> t_half_width(np.array([[1.0, 10.0], [3.0, 30.0]])).round(4)
    array([ 12.7062, 127.062 ])
    """
    n = len(values)
    return critical_t(1 - confidence, n - 1) * np.std(values, axis=0, ddof=1) / n**0.5


@cache
def critical_t(level: float, df: float) -> float:
    """The t that Student's t with `df` degrees of freedom exceeds, in size, with probability `level`.

    >>> round(critical_t(0.05, 2), 4)
    4.3027
    """
    from scipy import special

    return float(special.stdtrit(df, 1 - level / 2))


def are_equal(values: Sequence[float] | np.ndarray) -> bool:
    """Whether all values are the same, but for rounding.

    >>> are_equal([0.3, 0.1 + 0.2]), are_equal([1.0, 1.001])
    (True, False)
    """
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.abs(values).max()))


def p_value(values: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p value of Student's t test that the mean is 0; None for fewer than two values or all equal values.

    >>> round(p_value([1.0, 3.0]), 6)  # t = 2 with one degree of freedom
    0.295167
    >>> p_value([1.0, 1.0]), p_value([1.0])
    (None, None)
    """
    n = len(values)
    if n < 2 or are_equal(values):
        return None
    from scipy import stats

    t = float(np.mean(values)) / (float(np.std(values, ddof=1)) / n**0.5)
    return float(2 * stats.t.sf(abs(t), n - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values corrected for multiple tests (Holm 1979): p_(i) becomes min(1, max over j <= i of (m - j + 1) p_(j)).

    With a threshold of 0.05 the probability of one or more false positives is at most 5%. None stays None and is not
    counted.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    ascending = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for number, (p, position) in enumerate(ascending):
        highest = max(highest, min(1.0, (len(ascending) - number) * p))
        corrected[position] = highest
    return corrected


def minimum_detectable_effect(deviation: float, num_pairs: int) -> float:
    """The true difference that the two-sided paired t test at 5% detects with power 80%; nan for fewer than two pairs.

    Solves P(T > t_{0.975, n-1}) = 0.8 for d, where T is noncentral t with parameter d sqrt(n) / deviation (the other
    tail is below 1e-4 there).

    Args:
        deviation: standard deviation of the paired differences.
        num_pairs: n.

    >>> round(minimum_detectable_effect(1.0, 3), 2), round(minimum_detectable_effect(1.0, 16), 2)
    (3.26, 0.75)
    """
    if num_pairs < 2 or not deviation > 0:
        return float("nan") if num_pairs < 2 else 0.0
    return _detectable_noncentrality(num_pairs) * deviation / num_pairs**0.5


@cache
def _detectable_noncentrality(num_pairs: int) -> float:
    """The parameter of noncentral t at which the test of so many pairs has a power of 80%."""
    from scipy import optimize, stats

    df, limit = num_pairs - 1, stats.t.ppf((1 + CONFIDENCE) / 2, num_pairs - 1)

    def missing_power(noncentrality: float) -> float:
        return float(stats.nct.sf(limit, df, noncentrality)) - POWER

    return float(optimize.root_scalar(missing_power, bracket=(0.0, 20.0)).root)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; the standard deviation of one value is nan.

    >>> mean_and_std([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else float("nan")


Interval = tuple[float, float]
