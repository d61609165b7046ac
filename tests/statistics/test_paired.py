import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gengap_dist.statistics.paired import paired, t_interval

accuracies = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6)


@given(accuracies)
def test_intervals_hold_the_mean_and_t_is_scipys(pairs):
    ours, theirs = (dict(enumerate(values)) for values in zip(*pairs, strict=True))
    result = paired(ours, theirs)
    differences = np.array([a - b for a, b in pairs])
    assert result.mean == pytest.approx(differences.mean(), abs=1e-12)
    low, high = result.bootstrap
    assert differences.min() - 1e-12 <= low <= high + 1e-12 <= differences.max() + 2e-12
    if differences.std() > 1e-6:
        expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert result.student == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("num", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (21, 2.086), (31, 2.042), (121, 1.980)]
)
def test_the_t_interval_has_the_quantiles_of_printed_tables(num, quantile):
    """Two-sided 95%, n - 1 degrees of freedom: Fisher & Yates 1963, table III."""
    values = np.arange(num, dtype=float)
    low, high = t_interval(values)
    standard_error = (num * (num + 1) / 12 / num) ** 0.5  # of 0 .. n-1, whose variance is n (n + 1) / 12
    assert (high - low) / 2 / standard_error == pytest.approx(quantile, abs=5e-4)


def test_pairs_are_seeds_that_both_have():
    result = paired({0: 0.9, 1: 0.8, 5: 0.1}, {1: 0.7, 0: 0.6, 9: 0.3})
    assert result.differences == pytest.approx({0: 0.3, 1: 0.1})


def test_one_pair_has_no_interval_and_none_is_refused():
    assert paired({0: 0.9}, {0: 0.8}).bootstrap is None
    with pytest.raises(ValueError, match="no seed was run by both"):
        paired({0: 0.9}, {1: 0.8})


def test_the_interval_is_the_same_every_time():
    data = ({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.5, 1: 0.6, 2: 0.1})
    assert paired(*data) == paired(*data)


def test_coverage_is_what_the_docstring_says():
    """With 3 pairs the t interval covers 95% of the time and the bootstrap much less."""
    rng = np.random.default_rng(0)
    covered = {"bootstrap": 0, "student": 0}
    num = 300
    for _ in range(num):
        result = paired(dict(enumerate(rng.normal(1, 1, 3))), dict.fromkeys(range(3), 0.0))
        for name in covered:
            low, high = getattr(result, name)
            covered[name] += low <= 1 <= high
    assert 0.91 < covered["student"] / num < 0.99
    assert covered["bootstrap"] / num < 0.85
