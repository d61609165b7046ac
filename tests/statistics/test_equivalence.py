import numpy as np
import pytest
from scipy import stats

from gengap_dist.statistics.equivalence import equivalence_power, is_equivalent
from tests.conftest import FULL


def test_two_one_sided_tests_at_five_percent():
    rng = np.random.default_rng(0)
    seen = set()
    for num in (2, 3, 5, 10) * 25:
        values, margin = rng.normal(0, 0.5, num), rng.uniform(0.2, 2)
        too_low = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        too_high = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert is_equivalent(values, margin) is bool(max(too_low, too_high) <= 0.05)
        seen.add(is_equivalent(values, margin))
    assert seen == {True, False}


def test_a_difference_at_the_margin_is_called_equivalent_in_five_percent():
    rng = np.random.default_rng(0)
    num = 20_000 if FULL else 2_000
    values = rng.normal(0.5, 0.1, (num, 5))
    rate = np.mean([is_equivalent(row, 0.5) for row in values])
    assert rate == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / num) ** 0.5)


@pytest.mark.parametrize(
    ("deviation", "num_pairs", "margin"), [(0.5, 2, 1.0), (0.5, 3, 1.0), (0.5, 3, 0.86), (0.2, 5, 0.25), (1.0, 20, 0.5)]
)
def test_power_against_simulation(deviation, num_pairs, margin):
    num = 400_000 if FULL else 40_000
    values = np.random.default_rng(1).normal(0, deviation, (num, num_pairs))
    half_width = stats.t.ppf(0.95, num_pairs - 1) * values.std(axis=1, ddof=1) / num_pairs**0.5
    rate = np.mean(np.abs(values.mean(axis=1)) + half_width <= margin)
    assert equivalence_power(deviation, num_pairs, margin) == pytest.approx(rate, abs=4 * 0.5 / num**0.5)


def test_the_power_that_the_label_prints():
    """Three seeds, differences of training accuracy with standard deviation 0.5, and the widest margin, 1 point."""
    assert round(equivalence_power(0.5, 3, 1.0), 2) == 0.56


def test_power_grows_with_pairs_and_margin_to_one():
    by_num = [equivalence_power(0.5, num, 0.5) for num in (2, 3, 5, 10, 20, 50)]
    assert by_num == sorted(by_num)
    assert equivalence_power(0.5, 500, 0.5) == pytest.approx(1)
    assert equivalence_power(50.0, 3, 0.1) == pytest.approx(0, abs=1e-3)
