"""The gradient noise scale, from the gradients of training: no extra backward pass.

B is the size of the global batch, b that of the first micro-batch of a rank; G_B is the reduced gradient, G_b
that of the micro-batch before any reduction. Both are means over their samples.
McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.
"""

from dataclasses import dataclass

from gengap_dist.errors import UsageError

DECAY = 0.99  # of the moving averages, per recorded step


def unbiased_noise_estimates(
    small_squared: float, small_size: float, big_squared: float, big_size: float
) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr S from the squared gradient norms of two batch sizes.

    E|G_b|^2 = |G|^2 + tr S / b, so |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b) and
    tr S = (|G_b|^2 - |G_B|^2) / (1/b - 1/B); S is the covariance of one sample's gradient.

    Args:
        small_squared: |G_b|^2, or the mean of several.
        small_size: b; for several of unequal size their harmonic mean, for which both formulas are exact.
        big_squared: |G_B|^2.
        big_size: B.

    Raises:
        UsageError: if b is not smaller than B: the estimate needs two different batch sizes.

    >>> unbiased_noise_estimates(5.0, 1, 3.0, 2)  # |G|^2 = 1, tr S = 4
    (1.0, 4.0)
    """
    if small_size >= big_size:
        raise UsageError(
            f"the gradient noise scale needs two batch sizes and has {small_size:g} and {big_size:g}: "
            "train on more ranks, or set batch.micro_size below batch.global_size"
        )
    squared = (big_size * big_squared - small_size * small_squared) / (big_size - small_size)
    return squared, (small_squared - big_squared) / (1 / small_size - 1 / big_size)


@dataclass
class NoiseScale:
    """B_simple = tr S / |G|^2, from separate moving averages of numerator and denominator.

    The mean of per-step ratios would be strongly biased: the denominator is noisy and may be near zero.

    >>> scale = NoiseScale()
    >>> scale.add(5.0, 1, 3.0, 2)
    >>> scale.metrics()["noise_scale"]
    4.0
    """

    squared: float = 0.0
    trace: float = 0.0
    weight: float = 0.0  # sum of the averages' weights; corrects the bias of the start at zero

    def add(self, small_squared: float, small_size: float, big_squared: float, big_size: float) -> None:
        """Add the gradients of one step, see `unbiased_noise_estimates`."""
        squared, trace = unbiased_noise_estimates(small_squared, small_size, big_squared, big_size)
        self.squared = DECAY * self.squared + (1 - DECAY) * squared
        self.trace = DECAY * self.trace + (1 - DECAY) * trace
        self.weight = DECAY * self.weight + (1 - DECAY)

    def metrics(self) -> dict[str, float]:
        """`noise_scale` in samples, numerator and denominator; no scale while the estimate of |G|^2 is not positive."""
        if not self.weight:
            return {}
        out = {
            "noise_scale/gradient_squared": self.squared / self.weight,
            "noise_scale/trace_covariance": self.trace / self.weight,
        }
        return out | ({"noise_scale": self.trace / self.squared} if self.squared > 0 else {})
