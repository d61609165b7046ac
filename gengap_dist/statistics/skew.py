"""Signs that paired differences are too skewed or too scattered for a t test, and a test without normality; pure.

The t test keeps its level under heavy tails and not under skew, for instance where one run in ten collapses.
"""

from collections.abc import Sequence

import numpy as np

MAX_EXACT = 40  # values whose 2^n sign flips are all counted
NUM_FLIPS = 99_999  # drawn for more values


def skewness(values: Sequence[float] | np.ndarray) -> float | None:
    """G1 = n / ((n - 1) (n - 2)) sum ((x_i - mean) / sd)^3, sd with n - 1; None for n < 3 and for equal values.

    The adjusted Fisher-Pearson coefficient (Joanes & Gill 1998, The Statistician 47:183): n^2 / ((n - 1) (n - 2)) times
    the third central moment, over sd^3; unbiased (0) for symmetric distributions.

    >>> skewness([1.0, 2.0, 3.0]), round(skewness([0.0, 0.0, 3.0]), 6), skewness([1.0, 1.0, 1.0])  # the limit: sqrt(3)
    (0.0, 1.732051, None)
    """
    n = len(values)
    if n < 3 or _all_equal(values):
        return None
    standardized = (np.asarray(values, dtype=float) - np.mean(values)) / np.std(values, ddof=1)
    return float(n / ((n - 1) * (n - 2)) * np.sum(standardized**3))


def outlying(values: Sequence[float] | np.ndarray, limit: float = 5.0) -> list[int]:
    """Indices of the values that lie more than `limit` MAD from the median; none for fewer than MIN values.

    MAD = median_i |x_i - median(x)|.

    >>> outlying([1.0, 2.0, 3.0, 4.0, 5.0, 9.1]), outlying([1.0, 2.0, 3.0, 4.0, 5.0, 10.0])
    ([], [])
    """
    array = np.asarray(values, dtype=float)
    distances = np.abs(array - np.median(array))
    return [int(index) for index in np.flatnonzero(distances > limit * np.median(distances))]


def sign_flip_p(values: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p value that differences [n] are symmetric around 0, of their mean under flips of sign; None for n = 0.

    p = the share of the 2^n sign vectors e with |sum e_i x_i| >= |sum x_i| (Fisher 1935, The Design of Experiments, 21),
    so p >= 2^(1 - n). Sums that differ by rounding (1e-12 of sum |x_i|) count as equal.

    Exact up to 40 values: the sums of either half are listed, and pairs of them are counted by sorting one list, in
    O(n 2^(n / 2)). For more values (1 + c) / 100,000 with c of 99,999 drawn sign vectors (seed 0) at least as extreme.

    >>> sign_flip_p([1.0, 2.0, 3.0]), sign_flip_p([1.0, 2.0, -3.0]), sign_flip_p([1.0, 2.0, 3.0, -1.0])
    (0.25, 1.0, 0.375)
    """
    array = np.asarray(values, dtype=float)
    n = len(array)
    if not n:
        return None
    least = abs(float(array.sum())) - 1e-12 * float(np.abs(array).sum())
    if least <= 0:
        return 1.0
    if n > MAX_EXACT:
        rng = np.random.default_rng(0)
        sums = np.zeros(NUM_FLIPS)
        for value in array:
            sums += value * rng.choice((-1.0, 1.0), NUM_FLIPS)
        return (1 + int(np.sum(np.abs(sums) >= least))) / (1 + NUM_FLIPS)
    first, second = _signed_sums(array[: n // 2]), np.sort(_signed_sums(array[n // 2 :]))
    num_above = int(np.sum(len(second) - np.searchsorted(second, least - first)))
    return 2 * num_above / 2**n  # as many lie below -least


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """sum e_i x_i for all sign vectors e, [2^n]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums + value, sums - value))
    return sums


def _all_equal(values: Sequence[float] | np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())))
