"""Equivalence of two arms: whether the mean of paired differences lies inside +-margin; pure functions.

scipy is imported inside functions, see paired.py.
"""

from collections.abc import Sequence

import numpy as np

from gengap_dist.statistics.paired import Interval, critical_t, t_interval

ONE_SIDED_LEVEL = 0.05  # of each of the two tests, hence the 90% interval


def is_equivalent(values: Sequence[float] | np.ndarray, margin: float) -> bool | None:
    """Whether the 90% t interval of paired differences [n] lies inside [-margin, margin]; None for n < 2.

    mean -+ t_{0.95, n-1} sd / sqrt(n), sd with n - 1. This is the two one-sided tests procedure at 5% (Schuirmann 1987,
    J. Pharmacokinet. Biopharm. 15:657): a true difference outside the margin is called equivalent in at most 5% of
    cases. Equal differences d give the interval [d, d].

    Args:
        values: one difference a seed.
        margin: in the unit of the differences, > 0.

    >>> is_equivalent([0.1, -0.1, 0.0], 0.17), is_equivalent([0.1, -0.1, 0.0], 0.16)  # half width 2.92 x 0.1 / sqrt(3)
    (True, False)
    >>> is_equivalent([0.3, 0.3], 0.4), is_equivalent([0.3, 0.3], 0.2), is_equivalent([0.0], 1.0)
    (True, False, None)
    """
    interval = equivalence_interval(values)
    return None if interval is None else bool(-margin <= interval[0] and interval[1] <= margin)


def equivalence_interval(values: Sequence[float] | np.ndarray) -> Interval | None:
    """The 90% t interval of the mean of paired differences [n]; None for n < 2.

    >>> [round(end, 3) for end in equivalence_interval([0.1, -0.1, 0.0])]
    [-0.169, 0.169]
    """
    return t_interval(values, 1 - 2 * ONE_SIDED_LEVEL)


def equivalence_power(deviation: float, num_pairs: int, margin: float) -> float:
    """Probability that `is_equivalent` is True for independent normal differences of mean 0; 0 for n < 2.

    Mean and standard deviation s of a sample are independent, the mean is normal with standard deviation
    sigma / sqrt(n), and s = sigma chi_{n-1} / sqrt(n - 1). Hence the power is the integral over s from 0 to
    margin sqrt(n) / t_{0.95, n-1} of 2 Phi((margin - t_{0.95, n-1} s / sqrt(n)) sqrt(n) / sigma) - 1 (Phillips 1990,
    J. Pharmacokinet. Biopharm. 18:137); here over the probability F(s), numerically.

    Args:
        deviation: sigma, the standard deviation of the paired differences.
        num_pairs: n.
        margin: in the unit of `deviation`, > 0.

    >>> round(equivalence_power(0.5, 3, 1.0), 3), round(equivalence_power(0.5, 5, 1.0), 3)
    (0.558, 0.95)
    >>> equivalence_power(0.0, 3, 1.0), equivalence_power(0.5, 1, 1.0)
    (1.0, 0.0)
    """
    if num_pairs < 2:
        return 0.0
    if deviation == 0:
        return 1.0
    from scipy import integrate, special  # a hundred times as fast as scipy.stats, and reports ask for it of every arm

    df, standard_error = num_pairs - 1, deviation / num_pairs**0.5
    critical = critical_t(2 * ONE_SIDED_LEVEL, df)
    widest = margin / (critical * standard_error)  # of s / sigma: above it the interval is wider than the margin

    def at(probability: float) -> float:
        ratio = (2 * float(special.gammaincinv(df / 2, probability)) / df) ** 0.5  # s / sigma: chi, over sqrt(df)
        return 2 * float(special.ndtr(margin / standard_error - critical * ratio)) - 1

    return float(integrate.quad(at, 0.0, float(special.gammainc(df / 2, widest**2 * df / 2)), epsabs=1e-9)[0])
