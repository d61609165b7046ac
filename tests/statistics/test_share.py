import numpy as np
import pytest
from scipy import stats

from gengap_dist.statistics.paired import t_interval
from gengap_dist.statistics.share import share, share_interval
from gengap_dist.statistics.two_way import critical
from tests.conftest import FULL, thinned


def kept(gain: np.ndarray, lost: np.ndarray, k: float, limit: float, phi: np.ndarray) -> np.ndarray:
    """Whether a paired t test keeps each phi [grid], one test after the other."""
    return np.array([abs(stats.ttest_1samp(gain - one * k * lost, 0).statistic) < limit for one in phi])


def test_against_a_grid_of_t_tests():
    rng = np.random.default_rng(0)
    kinds = []
    for study in range(16):
        num, k = int(rng.integers(3, 12)), float(rng.uniform(0.3, 1.2)) * (-1) ** (study % 5 == 4)
        lost = rng.normal(1, rng.choice([0.2, 2]), num)
        gain = rng.uniform(-0.5, 1) * lost + rng.normal(0, 0.5, num)
        limit = critical(0.95, num)
        found = share_interval(gain, lost, k, limit)
        low, high = t_interval(lost)
        kinds.append(found is None)
        assert kinds[-1] == (low <= 0 <= high)
        if found:
            ((lowest, highest),) = found
            assert lowest < share(gain, lost, k) < highest
            grid = np.linspace(2 * lowest - highest, 2 * highest - lowest, 101)
            assert (kept(gain, lost, k, limit, grid) == ((lowest < grid) & (grid < highest))).all()
            assert not kept(gain, lost, k, limit, np.array([-1e6, 1e6])).any()
    assert 3 < sum(kinds) < 13


def test_an_unbounded_set_is_no_number():
    """Where the loss may be 0, any share is kept far out, and None is returned; t_interval agrees on where that is."""
    gain, lost = np.array([1.0, -1.0, 2.0]), np.array([1.0, -0.5, 2.0])
    limit = critical(0.95, 3)
    assert kept(gain, lost, 1.0, limit, np.array([-1e6, 1e6])).all()
    assert share_interval(gain, lost, 1.0, limit) is None


def test_edges():
    assert share_interval([1.0, 2.0], [1.0, 2.0], 0.0, 2.0) is None
    assert share_interval([1.0], [1.0], 1.0, 2.0) is None
    assert share_interval([1.0, 2.0], [1.0, 2.0], 1.0, float("inf")) is None
    ((low, high),) = share_interval([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 1.0, 4.3)
    assert (low, high) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("num_seeds", "phi"), thinned([(5, 0.0), (5, 1.0), (10, 0.5), (10, 1.0)], lambda num_seeds, phi: phi == 1)
)
def test_coverage_with_measured_k(num_seeds, phi):
    """Accuracies of six arms with standard deviation 0.2, near-rank losses 0.02; lost 1.72, growth 0.512, k 0.85."""
    rng = np.random.default_rng(0)
    num, limit = 10_000 if FULL else 1000, critical(0.95, num_seeds)
    hits = 0
    for _ in range(num):
        accuracy, rank_loss = rng.normal(0, 0.2, (6, num_seeds)), rng.normal(0, 0.02, (6, num_seeds))
        lost = 1.72 + accuracy[0] - accuracy[1]
        gain = 0.85 * phi * 1.72 + accuracy[2] - accuracy[3] - accuracy[4] + accuracy[5]
        growth = 0.512 + rank_loss[0] - rank_loss[1]
        fall = 0.85 * 0.512 + rank_loss[1] - rank_loss[2] - rank_loss[4] + rank_loss[5]
        ((low, high),) = share_interval(gain, lost, fall.mean() / growth.mean(), limit)
        hits += low <= phi <= high
    noise = 4 * (0.05 * 0.95 / num) ** 0.5
    assert 0.935 - noise <= hits / num <= 0.955 + noise


def test_coverage():
    """Of a true share, k known: the t test's, where the loss is surely not 0."""
    num, num_seeds = (20_000 if FULL else 1500), 5
    rng = np.random.default_rng(0)
    limit = critical(0.95, num_seeds)
    hits, asked = 0, 0
    for _ in range(num):
        lost = rng.normal(1.72, 0.28, num_seeds)
        gain = 0.6 * 0.9 * lost + rng.normal(0, 0.4, num_seeds)
        if found := share_interval(gain, lost, 0.9, limit):
            asked += 1
            hits += found[0][0] <= 0.6 <= found[0][1]
    assert asked > 0.95 * num
    assert hits / asked == pytest.approx(0.95, abs=4 * (0.05 * 0.95 / asked) ** 0.5)
