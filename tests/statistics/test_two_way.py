import math

import numpy as np
import pytest
from scipy import stats

from gengap_dist.statistics.paired import t_interval
from gengap_dist.statistics.sequential import DECLARED_LEVELS, OPEN_FIRST_LEVEL, e_critical_value
from gengap_dist.statistics.two_way import TwoWay, two_way
from tests.conftest import FULL


def by_loops(differences: np.ndarray) -> TwoWay:
    """Rule by rule, one sum over seeds and images after the other."""
    n, m = differences.shape
    table = [[float(differences[s, i]) for i in range(m)] for s in range(n)]
    rows = [math.fsum(row) / m for row in table]
    columns = [math.fsum(table[s][i] for s in range(n)) / n for i in range(m)]
    mean = math.fsum(rows) / n
    seeds = math.fsum((row - mean) ** 2 for row in rows) / (n - 1) / n
    images = math.fsum((column - mean) ** 2 for column in columns) / (m - 1) / m
    rest = math.fsum((table[s][i] - rows[s] - columns[i] + mean) ** 2 for s in range(n) for i in range(m))
    rest /= (n - 1) * (m - 1) * n * m
    variance = max(seeds + images - rest, seeds, images)
    df = variance**2 / (seeds**2 / (n - 1) + images**2 / (m - 1) + rest**2 / ((n - 1) * (m - 1)))
    return TwoWay(mean, variance, min(max(df, n - 1), m - 1), seeds, images, rest)


def correct(rng: np.random.Generator, seeds: float, images: float, num_seeds: int, num_images: int) -> np.ndarray:
    """Differences of "correct" of two arms, int8 [seeds, images]: an arm's ability by seed against an image's ease."""
    ease = rng.normal(1.0, 1.0, num_images)
    arms = [
        rng.normal(0, seeds, (num_seeds, 1))
        + ease
        + rng.normal(0, images, num_images)
        + rng.normal(0, 0.5, (num_seeds, num_images))
        > 0
        for _ in range(2)
    ]
    return arms[0].astype(np.int8) - arms[1].astype(np.int8)


@pytest.mark.parametrize(("num_seeds", "num_images"), [(2, 5), (3, 40), (10, 70)])
@pytest.mark.parametrize("kind", ["int8", "bool", "float32", "offset"])
def test_against_loops_over_seeds_and_images(num_seeds, num_images, kind):
    rng = np.random.default_rng(num_seeds)
    differences = {
        "int8": lambda: correct(rng, 0.2, 0.3, num_seeds, num_images),
        "bool": lambda: rng.random((num_seeds, num_images)) < 0.3,
        "float32": lambda: rng.normal(0, 1, (num_seeds, num_images)).astype(np.float32),
        "offset": lambda: 1e6 + rng.normal(0, 1, (num_seeds, num_images)),  # squares would lose half of the digits
    }[kind]()
    assert two_way(differences) == pytest.approx(by_loops(differences), rel=1e-8, abs=1e-15)


def test_intervals():
    differences = np.random.default_rng(0).normal(1, 1, (6, 50))
    found = two_way(differences)
    low, high = found.interval(0.9)
    assert (low + high) / 2 == pytest.approx(found.mean)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.95, found.df) * found.variance**0.5)
    assert found.interval_at(stats.t.ppf(0.95, found.df)) == pytest.approx((low, high))
    assert found.interval_at(math.inf) == (-math.inf, math.inf)


def test_images_that_do_not_differ_leave_the_seed_interval():
    differences = np.repeat(np.random.default_rng(0).normal(0, 1, (5, 1)), 200, axis=1)
    found = two_way(differences)
    assert (found.variance, found.df) == pytest.approx((found.variance_seeds, 4))
    assert found.interval(0.95) == pytest.approx(t_interval(differences[:, 0]))


def test_equal_differences_and_too_few():
    found = two_way(np.full((3, 7), 2, np.int8))
    assert (found.variance, found.df, found.interval(0.95), found.interval_at(5.0)) == (0, 2, (2, 2), (2, 2))
    for shape in ((1, 7), (7, 1)):
        found = two_way(np.ones(shape))
        assert found.mean == 1
        assert np.isnan(found[1:]).all()
        assert found.interval(0.95) is found.interval_at(2.0) is None


def test_more_seeds_than_images():
    """The degrees of freedom stay between the two."""
    assert 2 <= two_way(np.random.default_rng(0).normal(0, 1, (30, 3))).df <= 29


def covered(deviations: tuple[float, float, float], num_seeds: int, num_images: int, num: int) -> tuple[float, float]:
    """How often the intervals for new images and for these images hold the true mean 0 of all seeds and images."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(num):
        seeds, images, rest = deviations
        differences = rng.normal(0, seeds, (num_seeds, 1)) + rng.normal(0, images, num_images)
        differences = differences + rng.normal(0, rest, (num_seeds, num_images))
        new, same = two_way(differences).interval(0.95), t_interval(differences.mean(axis=1))
        hits += [low <= 0 <= high for low, high in (new, same)]
    return tuple(hits / num)


def test_new_images_are_covered():
    """Standard deviations of seed, image and both: here images are half of the variance. (Of 360, as digits has.)"""
    new, same = covered((0.02, 0.6, 0.4), 5, 360, 600)
    assert 0.925 <= new <= 0.985
    assert same < 0.85


@pytest.mark.full
@pytest.mark.parametrize("num_seeds", [3, 5, 10, 20])
@pytest.mark.parametrize("deviations", [(0.02, 0.6, 0.4), (0.02, 0.1, 0.4), (0.0, 0.5, 0.4), (0.05, 0.0, 0.4)])
def test_coverage(deviations, num_seeds):
    new, _ = covered(deviations, num_seeds, 360, 4000)
    assert 0.92 <= new <= 0.985


def test_looks_on_new_images():
    """Ever false in declared and open looks, and what the open looks do if only seeds are taken as sampled."""
    rng = np.random.default_rng(0)
    num = 2000 if FULL else 120
    limits = {n: e_critical_value(n, 0.01) for n in range(4, 21)} | {3: stats.t.ppf(1 - OPEN_FIRST_LEVEL / 2, 2)}
    declared_limits = {n: stats.t.ppf(1 - level / 2, n - 1) for n, level in DECLARED_LEVELS.items()}
    false = {"declared": 0, "open": 0, "seeds": 0}

    def excludes_0(interval: tuple[float, float]) -> bool:
        return not interval[0] <= 0 <= interval[1]

    for _ in range(num):
        differences = rng.normal(0, 0.02, (20, 1)) + rng.normal(0, 0.5, 360) + rng.normal(0, 0.4, (20, 360))
        looks = {n: two_way(differences[:n]) for n in range(3, 21)}
        false["declared"] += any(excludes_0(looks[n].interval_at(limit)) for n, limit in declared_limits.items())
        false["open"] += any(excludes_0(looks[n].interval_at(limit)) for n, limit in limits.items())
        only_seeds = {n: look._replace(variance=look.variance_seeds) for n, look in looks.items()}
        false["seeds"] += any(excludes_0(only_seeds[n].interval_at(limit)) for n, limit in limits.items())
    most = 0.05 + 4 * (0.05 * 0.95 / num) ** 0.5
    assert max(false["declared"], false["open"]) / num < most
    assert false["seeds"] / num > 0.3
