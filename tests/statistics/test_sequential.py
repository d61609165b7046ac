import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from gengap_dist.statistics.paired import t_interval
from gengap_dist.statistics.sequential import (
    DECLARED_LEVELS,
    OPEN_FIRST_LEVEL,
    OPEN_LATER_LEVEL,
    PRIOR_VARIANCE,
    declared_levels,
    e_critical_value,
    e_interval,
    e_p_value,
    e_value,
    false_alarm_rate,
    look_level,
)
from tests.conftest import FULL

NUM_STUDIES = 400_000 if FULL else 20_000


def t_statistics(values: np.ndarray) -> np.ndarray:
    """t of the first 2, 3, ... of values [studies, n]: [studies, n - 1]."""
    num = np.arange(2, values.shape[1] + 1)
    sums, squares = np.cumsum(values, axis=1)[:, 1:], np.cumsum(values**2, axis=1)[:, 1:]
    return sums / num / np.sqrt((squares - sums**2 / num) / (num - 1) / num)


def e_values(t: np.ndarray, num: np.ndarray, g: float) -> np.ndarray:
    """As the rule says it."""
    return (1 + num * g) ** -0.5 * ((1 + t**2 / (num - 1)) / (1 + t**2 / ((num - 1) * (1 + num * g)))) ** (num / 2)


def simulated_t(num: int) -> np.ndarray:
    """t [studies, n - 1] without any difference."""
    return t_statistics(np.random.default_rng(0).normal(0, 1, (NUM_STUDIES, num)))


def limit(rate: float) -> float:
    """Four standard errors of a simulated rate."""
    return 4 * (rate * (1 - rate) / NUM_STUDIES) ** 0.5


@pytest.mark.parametrize(
    ("num_first", "num_second", "first", "second"),
    [(10, 20, 0.01, 0.043), (2, 4, 0.02, 0.04), (3, 20, 0.025, 0.03), (5, 7, 0.01, 0.045)],
)
def test_two_looks_against_simulation(num_first, num_second, first, second):
    t = np.abs(simulated_t(num_second))
    found = (t[:, num_first - 2] > stats.t.ppf(1 - first / 2, num_first - 1)) | (
        t[:, num_second - 2] > stats.t.ppf(1 - second / 2, num_second - 1)
    )
    rate = false_alarm_rate(num_first, num_second, first, second)
    assert rate == pytest.approx(found.mean(), abs=limit(rate))


def test_looks_at_10_and_20():
    levels = DECLARED_LEVELS[10], DECLARED_LEVELS[20]
    assert 0.0485 < false_alarm_rate(10, 20, *levels) < 0.05  # 4.9%
    first, second = declared_levels(10, 20)
    assert (first, math.floor(1000 * second) / 1000) == levels
    assert false_alarm_rate(10, 20, first, second) == pytest.approx(0.05, abs=1e-8)


@pytest.mark.parametrize(("num_first", "num_second"), [(2, 4), (3, 50), (5, 10), (25, 27)])
def test_other_looks(num_first, num_second):
    first, second = declared_levels(num_first, num_second, 0.02)
    assert first == 0.02
    assert 0.03 <= second < 0.05
    assert false_alarm_rate(num_first, num_second, first, second) == pytest.approx(0.05, abs=1e-8)
    assert look_level([num_first, num_second], num_second) == declared_levels(num_first, num_second)[1]


def test_looks_that_were_not_declared():
    with pytest.raises(ValueError, match=r"no look was declared at 12 seeds \(declared: \[10, 20\]\)"):
        look_level([10, 20], 12)
    with pytest.raises(ValueError, match="3 looks"):
        look_level([5, 10, 20], 10)
    with pytest.raises(ValueError, match="two more"):
        look_level([10, 11], 11)
    with pytest.raises(ValueError, match="must lie between"):
        declared_levels(10, 20, first=0.05)


@pytest.mark.parametrize("g", [1.0, 4.0])
def test_e_is_a_likelihood_ratio(g):
    """Of t: noncentral with mu / sigma ~ N(0, g), integrated numerically, over central."""
    for num, t in ((2, 1.3), (5, 0.0), (5, 4.0), (12, -6.0)):
        effects = np.linspace(-9, 9, 4001) * g**0.5
        likelihood = stats.nct.pdf(t, num - 1, effects * num**0.5) * stats.norm.pdf(effects, scale=g**0.5)
        expected = integrate.trapezoid(likelihood, effects) / stats.t.pdf(t, num - 1)
        assert e_value(t, num, g) == pytest.approx(expected, rel=1e-5)
        assert e_value(t, num, g) == pytest.approx(float(e_values(np.array(t), np.array(num), g)))


def test_e_has_mean_one_without_a_difference():
    for num in (2, 3, 6, 20):
        mean, _ = integrate.quad(lambda t, num=num: e_value(t, num) * stats.t.pdf(t, num - 1), 0, np.inf, limit=200)
        assert 2 * mean == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num", [2, 3, 4, 5, 8, 20, 50])
@pytest.mark.parametrize("g", [1.0, 4.0])
def test_e_cannot_pass_its_bound(num, g):
    bound = (1 + num * g) ** ((num - 1) / 2)
    assert e_value(1e9, num, g) == pytest.approx(bound)
    assert e_value(math.inf, num, g) == pytest.approx(bound)
    assert e_value(3.0, num, g) < bound


def test_seeds_that_a_verdict_needs():
    """g = 1 never reaches 20 below 5 seeds; g = 4 reaches 20 from 4 seeds on, and 100 from 5."""
    assert e_value(math.inf, 4, 1.0) < 20 < e_value(math.inf, 5, 1.0)
    assert e_value(math.inf, 3) < 20 < e_value(math.inf, 4) < 100 < e_value(math.inf, 5)
    assert math.isinf(e_critical_value(4, 0.01))
    assert math.isfinite(e_critical_value(5, 0.01))
    assert e_value(1.0, 1) == 1
    assert math.isfinite(e_value(math.inf, 5000))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("g", [1.0, 4.0])
def test_intervals_by_numerical_inversion(alpha, g):
    """The interval ends where E of t(mu) crosses 1 / alpha, and is the whole line where it never does."""
    rng = np.random.default_rng(0)
    kinds = set()
    for num in (2, 3, 4, 5, 10, 30):
        values = rng.normal(1, 2, num)
        mean, error = values.mean(), values.std(ddof=1) / num**0.5

        def excess(mu: float, values=values, num=num) -> float:
            return e_value(abs(stats.ttest_1samp(values, mu).statistic), num, g) - 1 / alpha

        low, high = e_interval(values, alpha, g)
        kinds.add(math.isinf(low))
        if excess(mean + 1e9) < 0:
            assert (low, high) == (-math.inf, math.inf)
            assert (1 + num * g) ** ((num - 1) / 2) < 1 / alpha
        else:
            assert high == pytest.approx(optimize.brentq(excess, mean, mean + 1e9 * error, xtol=1e-12), rel=1e-6)
            assert low == pytest.approx(optimize.brentq(excess, mean - 1e9 * error, mean, xtol=1e-12), rel=1e-6)
            assert e_value(e_critical_value(num, alpha, g), num, g) == pytest.approx(1 / alpha)
    assert False in kinds
    assert e_interval([2.0] * 5, alpha, g) == ((2, 2) if 1 / alpha < (1 + 5 * g) ** 2 else (-math.inf, math.inf))


def test_p_values_of_e():
    assert [e_p_value(e) for e in (0.0, 0.5, 1.0, 20.0)] == [1, 1, 1, 0.05]


def test_ever_false_over_3_to_20_seeds():
    """First t at 4%, later E >= 100; and what looking at every n with t at 5% does."""
    t = simulated_t(20)[:, 1:]
    num = np.arange(3, 21)
    first = np.abs(t[:, 0]) > stats.t.ppf(1 - OPEN_FIRST_LEVEL / 2, 2)
    later = e_values(t[:, 1:], num[1:], PRIOR_VARIANCE) >= 1 / OPEN_LATER_LEVEL
    assert 0.035 < first.mean() < (first | later.any(axis=1)).mean() <= 0.05
    assert later.any(axis=1).mean() <= 0.01
    naive = np.abs(t) > stats.t.ppf(0.975, num - 1)
    assert naive.any(axis=1).mean() > 0.15


def test_an_extension_that_was_not_declared():
    """First t at 5%, then E >= 20: more than 5%, at most what the rule says."""
    t = simulated_t(20)[:, 1:]
    for place in range(8):
        num = np.arange(3 + place, 21)
        first = np.abs(t[:, place]) > stats.t.ppf(0.975, num[0] - 1)
        later = (e_values(t[:, place + 1 :], num[1:], PRIOR_VARIANCE) >= 20).any(axis=1)
        assert 0.045 < (first | later).mean() < 0.07


def test_true_differences_are_found_in_fewer_seeds_if_larger():
    values = np.random.default_rng(0).normal(0, 1, (1000, 20))
    num = np.arange(2, 21)
    by_effect = [e_values(t_statistics(values + effect), num, PRIOR_VARIANCE) for effect in (0.5, 1, 2)]
    found = [(e >= 100).any(axis=1).mean() for e in by_effect]
    assert found == sorted(found)
    assert found[-1] > 0.99


def test_the_e_interval_is_wider_than_t():
    values = np.random.default_rng(0).normal(0, 1, 12)
    e, t = e_interval(values, 0.01), t_interval(values, 0.99)
    assert e[0] < t[0] < t[1] < e[1]
