import numpy as np
import pytest
from scipy import stats

from gengap_dist.statistics.correlation import leave_one_out, spearman


@pytest.mark.parametrize("num", [3, 7, 30])
def test_spearman_is_scipys(num):
    rng = np.random.default_rng(num)
    for _ in range(20):
        x, y = rng.normal(size=num), rng.integers(0, 4, num)  # with ties
        if np.ptp(y):
            assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
            assert spearman(np.exp(x), y**3) == pytest.approx(spearman(x, y))  # of order only
    assert spearman([1.0], [2.0]) is None
    assert spearman(x, np.ones(num)) is None


def test_leaving_one_arm_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8))
    expected = [
        stats.spearmanr([*x[:arm], *x[arm + 1 :]], [*y[:arm], *y[arm + 1 :]]).statistic for arm in range(8)
    ]  # fmt: skip
    assert leave_one_out(x, y) == pytest.approx((min(expected), max(expected)))
    assert leave_one_out(x[:2], y[:2]) is None
    assert leave_one_out([0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]) is None  # constant without the last arm
