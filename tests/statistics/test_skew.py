import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gengap_dist.statistics import skew
from gengap_dist.statistics.skew import outlying, sign_flip_p, skewness


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=12))
def test_skewness_is_scipys(values):
    if np.std(values) > 1e-3:
        assert skewness(values) == pytest.approx(stats.skew(values, bias=False), abs=1e-6)
        assert abs(skewness(values)) <= len(values) ** 0.5 + 1e-9


def by_enumeration(values: list[float]) -> float:
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(sign * value for sign, value in zip(row, values, strict=True))) for row in signs]
    return float(np.mean(np.array(sums) >= abs(sum(values)) - 1e-9 * sum(map(abs, values))))


@given(st.lists(st.one_of(st.integers(-3, 3), st.floats(-10, 10).map(lambda x: round(x, 3))), min_size=1, max_size=9))
def test_sign_flips_are_all_counted(values):
    assert sign_flip_p(values) == by_enumeration(values)


@pytest.mark.parametrize("num", [12, 20])
def test_sign_flips_are_scipys(num):
    values = np.random.default_rng(num).normal(0.3, 1, num)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    ).pvalue  # exact for 12 values, drawn for 20
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-9 if num == 12 else 4 * 0.5 / 20_000**0.5)


def test_drawn_flips_agree_with_exact_ones(monkeypatch):
    values = np.random.default_rng(0).normal(0.4, 1, 24)
    exact = sign_flip_p(values)
    monkeypatch.setattr(skew, "MAX_EXACT", 10)
    drawn = sign_flip_p(values)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / skew.NUM_FLIPS) ** 0.5)
    assert sign_flip_p(values) == drawn


def test_the_smallest_p():
    assert sign_flip_p([0.5] * 5) == 2 / 2**5
    assert sign_flip_p(np.full(40, 0.1)) == 2 / 2**40
    assert sign_flip_p(np.full(41, 0.1)) == 1e-5
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([3.0]) == 1
    assert sign_flip_p([]) is None


def test_equal_sums_count_in_spite_of_rounding():
    """0.1 + 0.2 - 0.3 is not 0 in float64, and 0.1 + 0.2 > 0.3."""
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_p([0.3, 0.3, 0.1, -0.1]) == by_enumeration([3, 3, 1, -1])


def test_outlying_values():
    values = [0.2, -0.1, 0.4, 0.0, 0.3, -8.0]
    assert outlying(values) == [5]
    assert outlying(values, limit=100) == []
    assert outlying(np.array(values) * 1e3 + 7) == [5]
    assert outlying([0.1 + 0.2, 0.3, 0.3, 0.3]) == outlying([]) == outlying([1.0]) == []
    assert outlying([0.3, 0.3, 0.3, 0.4]) == [3]


def test_how_often_normal_values_look_outlying_or_skewed():
    """As the docstrings say."""
    rng = np.random.default_rng(0)
    num = 1000
    for size, outliers, skewed in ((3, 0.21, None), (6, 0.066, 0.237), (10, 0.036, 0.141), (20, 0.013, 0.054)):
        samples = rng.normal(0, 1, (num, size))
        for expected, rate in (
            (outliers, np.mean([bool(outlying(sample)) for sample in samples])),
            (skewed, np.mean([abs(skewness(sample)) > 1 for sample in samples])),
        ):
            if expected:
                assert rate == pytest.approx(expected, abs=4 * (expected * (1 - expected) / num) ** 0.5)
