"""Correlations of centred variables, their confidence intervals and p values; pure functions."""

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import numpy as np

from gengap_dist.statistics.paired import CONFIDENCE, Interval

MAX_EXACT = 9  # observations of which all orders are counted


def subtract_group_mean(values: np.ndarray, group_labels: Sequence[int]) -> np.ndarray:
    """Values [n] minus the mean of the values with the same label, [n].

    >>> subtract_group_mean(np.array([1.0, 3.0, 5.0]), [0, 0, 1])
    array([-1.,  1.,  0.])
    """
    groups = np.array(group_labels)
    out = values.astype(float)
    for label in set(group_labels):
        out[groups == label] -= out[groups == label].mean()
    return out


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Sum x y / sqrt(sum x^2 sum y^2) of two centred variables [n]; None if one of them is constant.

    >>> round(pearson(np.array([-1.0, 0.0, 1.0]), np.array([-1.0, -1.0, 2.0])), 6)
    0.866025
    """
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if not scale > 1e-12:
        return None
    return float(np.clip(x @ y / scale, -1.0, 1.0))


def partial_correlation(x: np.ndarray, y: np.ndarray, u: np.ndarray) -> float | None:
    """Partial correlation of x and y [n] given u, all centred; None if u explains one of them, or one is constant.

    >>> x, y, u = np.array([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
    >>> round(pearson(x + u, y + u), 6), abs(round(partial_correlation(x + u, y + u, u), 6))  # related only through u
    (0.5, 0.0)
    """
    xy, xu, yu = pearson(x, y), pearson(x, u), pearson(y, u)
    if xy is None or xu is None or yu is None:
        return None
    unexplained = (1 - xu**2) * (1 - yu**2)
    if unexplained < 1e-9:
        return None
    return float(np.clip((xy - xu * yu) / unexplained**0.5, -1.0, 1.0))


def fisher_interval(r: float, num: int, num_controls: int = 0, variance: float = 1.0) -> Interval | None:
    """95% interval of a correlation of `num` independent observations (Fisher's z), given `num_controls` variables.

    tanh(atanh r +- 1.96 sqrt(variance / (num - 3 - num_controls))); None for fewer than num_controls + 4 observations.
    The variance is 1 for Pearson's r, and 1.06 for Spearman's.

    >>> [round(end, 3) for end in fisher_interval(0.5, 28)]
    [0.156, 0.736]
    >>> fisher_interval(0.5, 3)
    """
    if num - 3 - num_controls < 1:
        return None
    from scipy import stats  # slow to import, see paired.py

    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * (variance / (num - 3 - num_controls)) ** 0.5
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return (float(np.tanh(z - half)), float(np.tanh(z + half)))


def p_value_of_r(r: float, num: int) -> float | None:
    """Two-sided p value of a correlation of `num` observations: t = r sqrt((num - 2) / (1 - r^2)), num - 2 df.

    >>> round(p_value_of_r(0.5, 28), 4), p_value_of_r(0.5, 2)
    (0.0067, None)
    """
    df = num - 2
    if df < 1:
        return None
    from scipy import stats

    t = abs(r) * (df / max(1 - r**2, 1e-15)) ** 0.5
    return float(2 * stats.t.sf(t, df))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's correlation of x and y [n]: Pearson's of their ranks, equal values with their mean rank.

    It asks only whether one increases with the other, so that a single extreme arm cannot make it. None for n < 2 and
    if one of them is constant.

    >>> round(spearman([1.0, 2.0, 3.0, 100.0], [1.0, 4.0, 2.0, 5.0]), 9), spearman([1.0, 1.0], [0.0, 1.0])
    (0.8, None)
    """
    from scipy import stats

    positions_x, positions_y = (stats.rankdata(values) for values in (x, y))
    return pearson(positions_x - positions_x.mean(), positions_y - positions_y.mean()) if len(positions_x) > 1 else None


def spearman_p_value(r: float, num: int) -> float | None:
    """Two-sided p value of Spearman's correlation of `num` observations; None for fewer than three.

    Up to nine observations the share of all orders of one variable with |r| at least as large, without ties; for more,
    Student's t of r (`p_value_of_r`).

    >>> spearman_p_value(1.0, 4), spearman_p_value(0.6, 7)  # 2 of 24 orders
    (0.08333333333333333, 0.16666666666666666)
    """
    if num < 3:
        return None
    if num > MAX_EXACT:
        return p_value_of_r(r, num)
    return float(np.mean(_null_distribution(num) >= abs(r) - 1e-9))


@cache
def _null_distribution(num: int) -> np.ndarray:
    """|Spearman's r| of (0, ..., num - 1) with each of its orders, [num!]: 1 - 6 sum d^2 / (num^3 - num)."""
    orders = np.array(list(permutations(range(num))), dtype=np.int16)
    return np.abs(1 - 6 * np.sum((orders - np.arange(num)) ** 2, axis=1) / (num**3 - num))


def leave_one_out(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Smallest and largest of Spearman's correlations of x and y [n] with one of the n arms left out.

    None for n < 3, and if one of x and y is constant without some arm.

    >>> leave_one_out([1.0, 2.0, 3.0, 9.0], [3.0, 2.0, 1.0, 9.0])  # all that rises in it is the last one
    (-1.0, 0.5)
    """
    if len(x) < 3:
        return None
    from scipy import stats

    first, second = (stats.rankdata(values) for values in (x, y))
    without = ([_centred_ranks_without(ranks, arm) for ranks in (first, second)] for arm in range(len(x)))
    correlations = [pearson(*both) for both in without]
    known = [r for r in correlations if r is not None]
    return (min(known), max(known)) if len(known) == len(correlations) else None


def _centred_ranks_without(ranks: np.ndarray, left_out: int) -> np.ndarray:
    """Ranks [n] minus their mean as they are without one of the values: [n - 1].

    A larger value moves down by one, an equal one by a half.
    """
    others = np.delete(ranks, left_out)
    moved = others - (np.sign(others - ranks[left_out]) + 1) / 2
    return moved - moved.mean()
