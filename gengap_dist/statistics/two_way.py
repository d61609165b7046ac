"""Mean difference over seeds and test images, both sampled: its variance for new seeds and new images; pure functions.

The t interval over seeds holds for the test images that were used. scipy is imported inside functions, see paired.py.
"""

import math
from typing import NamedTuple

import numpy as np

from gengap_dist.statistics.paired import Interval, critical_t


def critical(confidence: float, num_seeds: int) -> float:
    """t_{(1 + confidence) / 2, n-1}, the critical value of the t interval over n seeds; infinite for n < 2.

    >>> round(critical(0.95, 10), 4), critical(0.95, 1)
    (2.2622, inf)
    """
    return math.inf if num_seeds < 2 else critical_t(1 - confidence, num_seeds - 1)


class TwoWay(NamedTuple):
    """Mean of differences over seeds and samples with the parts of its variance; `two_way` has the formulas."""

    mean: float
    variance: float
    """V, of the mean, for new seeds and new samples; like all below nan for fewer than two seeds or two samples."""
    df: float
    """Degrees of freedom of `variance`."""
    variance_seeds: float
    """V_seed: of the mean, for new seeds and the same samples."""
    variance_samples: float
    """V_img: of the mean, for new samples and the same seeds."""
    variance_rest: float
    """V_e: what of both is due to the single (seed, sample)."""

    def interval(self, confidence: float) -> Interval | None:
        """Mean -+ t_{(1 + confidence) / 2, df} sqrt(V); None for fewer than two seeds or two samples.

        >>> [round(end, 4) for end in TwoWay(1.0, 0.01, 4.0, 0.01, 0.0, 0.0).interval(0.95)]  # t = 2.7764
        [0.7224, 1.2776]
        """
        if math.isnan(self.df):
            return None
        return self.interval_at(critical_t(1 - confidence, self.df))

    def interval_at(self, critical_value: float) -> Interval | None:
        """Mean -+ critical_value sqrt(V); None for fewer than two seeds or two samples.

        For repeated looks: the critical value is the one of the interval over seeds at that look, `critical(1 - level,
        n)` of a t test and `sequential.e_critical_value` of an e-value. An infinite one gives the whole line.

        >>> TwoWay(1.0, 0.25, 4.0, 0.25, 0.0, 0.0).interval_at(3.0)
        (-0.5, 2.5)
        """
        if math.isnan(self.variance):
            return None
        half_width = math.inf if math.isinf(critical_value) else critical_value * self.variance**0.5
        return (self.mean - half_width, self.mean + half_width)


def two_way(differences_SM: np.ndarray) -> TwoWay:
    """Mean of differences [S seeds, M samples] and its variance over new seeds and new samples.

    With row means D_s., column means D_.i, mean D_.. and variances with n - 1, n = S:

        V_seed = var_s(D_s.) / n
        V_img = var_i(D_.i) / M
        V_e = sum_si (D_si - D_s. - D_.i + D_..)^2 / ((n - 1) (M - 1)) / (n M)
        V = max(V_seed + V_img - V_e, V_seed, V_img)
        df = V^2 / (V_seed^2 / (n - 1) + V_img^2 / (M - 1) + V_e^2 / ((n - 1) (M - 1))), within [n - 1, M - 1]

    For D_si = mu + a_s + b_i + e_si with independent effects, var(D_..) = var_a / n + var_b / M + var_e / (n M), and
    V_seed and V_img contain the last term once each: V_seed + V_img - V_e is unbiased (moments of the
    crossed random-effects model, Cornfield & Tukey 1956, Ann. Math. Stat. 27:907). The degrees of freedom are
    Satterthwaite's (1946, Biometrics Bull. 2:110).

    One pass a seed in float64: apart from the input, memory for one row is used.

    Args:
        differences_SM: score of one arm minus that of the other, by seed and test sample, of any real type: int8 for
            "correct" minus "correct".

    >>> both = two_way(np.array([[1.0, 3.0], [2.0, 8.0]]))
    >>> both.mean, both.variance_seeds, both.variance_samples, both.variance_rest
    (3.5, 2.25, 4.0, 1.0)
    >>> both.variance, both.df  # 5.25^2 / (2.25^2 + 4^2 + 1^2) = 1.25, between 1 and 1
    (5.25, 1.0)
    """
    num_seeds, num_samples = differences_SM.shape
    seed_means = differences_SM.mean(axis=1, dtype=np.float64)
    mean = float(seed_means.mean())
    if min(num_seeds, num_samples) < 2:
        nan = float("nan")
        return TwoWay(mean, nan, nan, nan, nan, nan)
    sample_means = differences_SM.mean(axis=0, dtype=np.float64)
    squares = 0.0
    for row, seed_mean in zip(differences_SM, seed_means, strict=True):
        residuals = row - sample_means
        residuals -= seed_mean - mean
        squares += float(residuals @ residuals)
    df_seeds, df_samples = num_seeds - 1, num_samples - 1
    seeds = float(seed_means.var(ddof=1)) / num_seeds
    samples = float(sample_means.var(ddof=1)) / num_samples
    rest = squares / (df_seeds * df_samples) / (num_seeds * num_samples)
    variance = max(seeds + samples - rest, seeds, samples)
    spread = seeds**2 / df_seeds + samples**2 / df_samples + rest**2 / (df_seeds * df_samples)
    df = variance**2 / spread if spread > 0 else 0.0
    fewest, most = sorted((df_seeds, df_samples))
    return TwoWay(mean, variance, float(min(max(df, fewest), most)), seeds, samples, rest)
