"""Looking at a study more than once: levels of declared looks, and e-values for any number of looks.

A t test at 5% at each number of seeds from 3 to 20 finds a difference where none is in 23% of studies. Two remedies:
looks that are declared before the first one have levels whose tests find one in at most 5% together; a study that may
be extended without end (`study.may_extend`) is judged by a t test at 4% at its first look and by an e-value of at least
100 at all later ones: at most 4% + 1%, and 4.3% where each number of seeds from 3 to 20 is looked at. A study that is
extended without having declared it, judged at 5% and then by an e-value of 20, has up to 6.3%. (A million simulated
studies each.) scipy is imported inside functions, see paired.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from gengap_dist.errors import UsageError
from gengap_dist.statistics.paired import CONFIDENCE, Interval

TOTAL_LEVEL = round(1 - CONFIDENCE, 9)
DECLARED_LEVELS = {10: 0.01, 20: 0.043}
"""Number of seeds to two-sided level of the t test: `declared_levels(10, 20)`, the second rounded down; 4.9% in all."""
OPEN_FIRST_LEVEL = 0.04  # of the t test at the first look of a study that may be extended
OPEN_LATER_LEVEL = round(TOTAL_LEVEL - OPEN_FIRST_LEVEL, 9)  # of all its later looks together: e-value >= 100
PRIOR_VARIANCE = 4.0  # g: of the standardized difference mu / sigma, see `e_value`
NUM_NODES = 160  # in each of two dimensions: the rate to 1e-8 for looks at 10 and 20, to 1e-5 for looks at 2 and 4


def look_level(look_sizes: Sequence[int], at: int) -> float:
    """Two-sided level of the t test at the look with `at` seeds of a study with one or two declared looks.

    One look has 0.05. Two have `DECLARED_LEVELS` at 10 and 20 seeds, and `declared_levels` at other sizes.

    Args:
        look_sizes: number of seeds at each look, ascending, as declared before the first one.
        at: one of them.

    Raises:
        UsageError: if `at` is none of the looks, there are more than two, or the second adds fewer than two seeds.

    >>> look_level([5], 5), look_level([10, 20], 10), look_level([10, 20], 20)
    (0.05, 0.01, 0.043)
    """
    if at not in look_sizes:
        raise UsageError(f"no look was declared at {at} seeds (declared: {list(look_sizes)}): judge at a declared one")
    if len(look_sizes) == 1:
        return TOTAL_LEVEL
    if len(look_sizes) > 2:
        raise UsageError(
            f"{len(look_sizes)} looks ({list(look_sizes)}) were declared, and levels are known for one or two: declare "
            "two, or set study.may_extend"
        )
    if tuple(look_sizes) == tuple(DECLARED_LEVELS):
        return DECLARED_LEVELS[at]
    return declared_levels(*look_sizes)[look_sizes.index(at)]


def declared_levels(
    num_first: int, num_second: int, first: float = 0.01, total: float = TOTAL_LEVEL
) -> tuple[float, float]:
    """Levels of the t tests at the first and second look: `first`, and what leaves `total` over both.

    Solves false_alarm_rate(n1, n2, first, second) = total. As the second look has all seeds, its level is larger than
    total - first.

    Raises:
        UsageError: as `false_alarm_rate`, or if `first` is not between 0 and `total`.

    >>> first, second = declared_levels(10, 20)
    >>> first, math.floor(1000 * second) / 1000
    (0.01, 0.043)
    """
    if not 0 < first < total:
        raise UsageError(f"the level of the first look ({first}) must lie between 0 and {total}, that of both")
    from scipy import optimize

    def excess(second: float) -> float:
        return false_alarm_rate(num_first, num_second, first, second) - total

    return first, optimize.root_scalar(excess, bracket=(1e-6, total), xtol=1e-9).root


def false_alarm_rate(num_first: int, num_second: int, first: float, second: float) -> float:
    """Probability that two t tests, the second with all n2 pairs and the first with n1 of them, find a mean of 0 not 0.

    The differences are independent and normal. A t statistic with n pairs is t = sqrt(n - 1) c / sqrt(1 - c^2) with c =
    sum x / sqrt(n sum x^2), the cosine of the angle between x and (1, ..., 1). With k = n2 - n1, and c1 and c' those of
    the first n1 and of the other k values,

        c2 = (sqrt(n1 q) c1 + sqrt(k (1 - q)) c') / sqrt(n2)

    where q = (sum of the first n1 x^2) / sum x^2 is Beta(n1 / 2, k / 2), and q, c1 and c' are independent (lengths and
    directions of normal vectors are). So the rate is first + (1 - first) x mean over q and over c1 below its limit of
    P(|c2| above its limit), which is a probability of Student's t with k - 1 degrees of freedom; the two means are by
    Gauss-Legendre quadrature over the probabilities of t1 and q.

    Args:
        num_first: n1, at least 2.
        num_second: n2, at least n1 + 2.
        first: two-sided level of the first test.
        second: two-sided level of the second test.

    Raises:
        UsageError: if n1 or n2 is smaller than that.

    >>> round(false_alarm_rate(10, 20, 0.01, 0.043), 3), round(false_alarm_rate(10, 20, 0.05, 0.05), 3)
    (0.049, 0.085)
    """
    num_added = num_second - num_first
    if num_first < 2 or num_added < 2:
        raise UsageError(
            f"looks at {num_first} and {num_second} seeds: the first needs two seeds, and the second two more than it"
        )
    from scipy import stats

    nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES)
    probabilities, weights = (1 + nodes) / 2, weights / 2  # over (0, 1)
    t_first = stats.t.ppf(first / 2 + (1 - first) * probabilities, num_first - 1)  # of those that are not found
    cosine_first = (t_first / np.sqrt(t_first**2 + num_first - 1))[:, None]
    share = stats.beta.ppf(probabilities, num_first / 2, num_added / 2)  # q
    t_second = stats.t.ppf(1 - second / 2, num_second - 1)
    limit = num_second**0.5 * t_second / (t_second**2 + num_second - 1) ** 0.5
    known = np.sqrt(num_first * share) * cosine_first  # sqrt(n2) c2 without its second part [c1, q]
    missed = _cosine_cdf((limit - known) / np.sqrt(num_added * (1 - share)), num_added)
    missed -= _cosine_cdf((-limit - known) / np.sqrt(num_added * (1 - share)), num_added)
    return first + (1 - first) * float(weights @ (1 - missed) @ weights)


def _cosine_cdf(cosines: np.ndarray, num: int) -> np.ndarray:
    """P(c <= cosines) for c = sum x / sqrt(num sum x^2) of `num` independent normal values of mean 0."""
    from scipy import stats

    inside = np.clip(cosines, -1 + 1e-15, 1 - 1e-15)
    return stats.t.cdf(inside * np.sqrt((num - 1) / (1 - inside**2)), num - 1)


def e_value(t: float, num_pairs: int, g: float = PRIOR_VARIANCE) -> float:
    """E_n of the hypothesis that the mean of n normal differences is 0, from their t statistic; 1 for n = 1.

    E_n = (1 + n g)^(-1/2) [(1 + t^2 / (n - 1)) / (1 + t^2 / ((n - 1) (1 + n g)))]^(n / 2),

    the likelihood ratio of t under mu / sigma ~ N(0, g) and under mu = 0 (Lai 1976, Ann. Stat. 4:265; Wang & Ramdas
    2023, arXiv:2310.03722). Without a difference E_n is a martingale of mean 1 while seeds are added, so that it ever
    reaches 1 / alpha in at most alpha of all studies (Ville 1939), however often and at whatever n one looks.

    E_n grows with t^2 to (1 + n g)^((n - 1) / 2) and cannot pass it: with g = 4 it can reach 100
    from 5 seeds on. Computed as its logarithm, and cut off at e^700.

    Args:
        t: mean / (sd / sqrt(n)), sd with n - 1; may be infinite.
        num_pairs: n.
        g: variance of mu / sigma under the alternative.

    >>> round(e_value(0.0, 2), 6), round(e_value(3.0, 2, g=1.0), 6), round(e_value(math.inf, 3), 6)
    (0.333333, 1.443376, 13.0)
    """
    if num_pairs < 2:
        return 1.0
    # with x = t^2 / (n - 1) the bracket is (1 + n g) / (1 + n g / (1 + x))
    x = t**2 / (num_pairs - 1)
    log_e = (num_pairs - 1) / 2 * math.log1p(num_pairs * g) - num_pairs / 2 * math.log1p(num_pairs * g / (1 + x))
    return math.exp(min(log_e, 700.0))


def e_critical_value(num_pairs: int, alpha: float, g: float = PRIOR_VARIANCE) -> float:
    """The |t| at which E_n = 1 / alpha; infinite where E_n cannot reach it.

    With x = t^2 / (n - 1) and c = ((1 + n g) / alpha^2)^(1 / n), E_n < 1 / alpha means
    (1 + x) / (1 + x / (1 + n g)) < c. Solved for x: t^2 < (n - 1) (c - 1) / (1 - c / (1 + n g)) for c < 1 + n g, and
    any t otherwise.

    >>> round(e_critical_value(10, 0.01), 4), round(e_value(5.1079, 10), 2), e_critical_value(4, 0.01)
    (5.1079, 100.0, inf)
    """
    bound = 1 + num_pairs * g
    c = (bound / alpha**2) ** (1 / num_pairs)
    if num_pairs < 2 or c >= bound:
        return math.inf
    return ((num_pairs - 1) * (c - 1) / (1 - c / bound)) ** 0.5


def e_interval(values: Sequence[float] | np.ndarray, alpha: float, g: float = PRIOR_VARIANCE) -> Interval:
    """The means mu that E_n >= 1 / alpha does not exclude: mean -+ e_critical_value sd / sqrt(n), sd with n - 1.

    The intervals of all n together hold the true mean with probability 1 - alpha. (-inf, inf) where E_n cannot reach
    1 / alpha, among them fewer than two values.

    Args:
        values: one difference a seed, [n].
        alpha: level of the look: 0.01 for "told apart at E >= 100".
        g: as in `e_value`.

    >>> [round(end, 6) for end in e_interval([1.0, 3.0], 0.5)], e_interval([1.0, 3.0], 0.3)  # t^2 < 15; E cannot pass 3
    ([-1.872983, 5.872983], (-inf, inf))
    """
    critical = e_critical_value(len(values), alpha, g)
    if math.isinf(critical):
        return (-math.inf, math.inf)
    mean, half_width = float(np.mean(values)), critical * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return (mean - half_width, mean + half_width)


def e_p_value(e: float) -> float:
    """min(1, 1 / E), a p value that stays valid when seeds are added; for Holm's correction.

    >>> e_p_value(100.0), e_p_value(0.2), e_p_value(0.0)
    (0.01, 1.0, 1.0)
    """
    return 1 / e if e > 1 else 1.0
