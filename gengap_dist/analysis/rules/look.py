"""How sure a difference must be at one look at a study: its level, and the test that keeps it over all looks."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gengap_dist.statistics.paired import Interval, are_equal, critical_t
from gengap_dist.statistics.sequential import e_critical_value, e_p_value, e_value

LEVEL = 0.05
Values = Sequence[float] | np.ndarray


class Look(NamedTuple):
    """The test of one look. "Surely" means that its interval, by default of 95%, excludes a value.

    If all differences d of two or more pairs are equal, the interval is [d, d].
    """

    level: float = LEVEL
    """A p value below it is significant; 1 minus the confidence of the intervals."""
    by_e_value: bool = False
    """Judge by e-values, which stay valid after any number of looks, and not by Student's t."""
    sentence: str = ""
    """What readers must know of this look; empty for a single one."""
    name: str = ""
    """In two or three words: "look 1 of 2"; empty for a single one."""

    @property
    def confidence(self) -> str:
        """Of its intervals, in percent; empty if nothing is sure.

        >>> Look().confidence, Look(0.01).confidence, Look(0.043).confidence, Look(0.0).confidence
        ('95%', '99%', '95.7%', '')
        """
        return f"{100 * (1 - self.level):.4g}%" if self.level else ""

    def interval(self, values: Values) -> Interval | None:
        """The interval of the mean of paired differences; None for fewer than two.

        >>> [round(end, 3) for end in Look().interval([1.0, 3.0])], Look().interval([0.5, 0.5])
        ([-10.706, 14.706], (0.5, 0.5))
        """
        n, array = len(values), np.asarray(values, dtype=float)
        if n < 2:
            return None
        mean = float(array.mean())
        if self.critical(n) == math.inf:
            return (-math.inf, math.inf)
        if are_equal(array):
            return (mean, mean)
        half_width = self.critical(n) * float(array.std(ddof=1)) / n**0.5
        return (mean - half_width, mean + half_width)

    def critical(self, num_pairs: int) -> float:
        """The t statistic of so many pairs, at least 2, that is significant; infinite where no e-value can be.

        >>> round(Look().critical(3), 4), round(Look(0.01, by_e_value=True).critical(10), 4)
        (4.3027, 5.1079)
        """
        return e_critical_value(num_pairs, self.level) if self.by_e_value else critical_t(self.level, num_pairs - 1)

    def p(self, values: Values, limit: float = 0.0) -> float:
        """Two-sided p of the mean being `limit`; 1 for fewer than two differences, 0 if all are equal to another value.

        >>> round(Look().p([1.0, 3.0]), 6), Look().p([1.0, 3.0], limit=2.0), Look().p([0.5, 0.5])
        (0.295167, 1.0, 0.0)
        """
        n, array = len(values), np.asarray(values, dtype=float) - limit
        if n < 2 or self.critical(n) == math.inf:
            return 1.0
        if are_equal(array):
            return float(abs(array.mean()) <= 1e-12)
        return self.p_of_t(float(array.mean()) / (float(array.std(ddof=1)) / n**0.5), n)

    def p_of_t(self, t: float, num_pairs: int) -> float:
        """Two-sided p of a t statistic of so many pairs."""
        return e_p_value(e_value(t, num_pairs)) if self.by_e_value else two_sided_p(t, num_pairs - 1)

    def is_above(self, values: Values, limit: float = 0.0) -> bool:
        """Whether the mean is surely above `limit`."""
        interval = self.interval(values)
        return interval is not None and interval[0] > limit

    def is_below(self, values: Values, limit: float = 0.0) -> bool:
        """Whether the mean is surely below `limit`."""
        interval = self.interval(values)
        return interval is not None and interval[1] < limit

    def is_within(self, values: Values, limit: Values | float) -> bool:
        """Whether the mean's distance from 0 is surely below `limit`: one number, or one for each pair."""
        array = np.asarray(values, dtype=float)
        return self.is_below(array - limit) and self.is_above(array + limit)


def two_sided_p(t: float, df: float) -> float:
    """Probability that Student's t with `df` degrees of freedom exceeds `t` in size."""
    from scipy import special

    return float(2 * special.stdtr(df, -abs(t)))


def array_of(values: Mapping[int, float]) -> np.ndarray:
    """The values in the order of their seeds: [n]."""
    return np.array([values[seed] for seed in sorted(values)], dtype=float)
