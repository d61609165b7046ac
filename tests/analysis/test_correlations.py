import numpy as np
import pytest
from scipy import stats

from gengap_dist.analysis.correlations import correlations
from gengap_dist.analysis.results import Correlation, Run
from tests.analysis.test_claims import BASE


def runs_of(values: np.ndarray, lost: np.ndarray, updates: np.ndarray, name: str = "effective_rank/fc") -> list[Run]:
    """Runs of arms x seeds from arrays of that shape; updates by arm."""
    template = {"status": "finished", "settings": BASE, "global_size": 64, "num_epochs": 1.0, "target": None}
    empty = {
        "own_batch": {},
        "own_batch_untrained": {},
        "updates_to_target": None,
        "num_probe_samples": 64,
    }
    return [
        Run(
            arm=f"arm{arm}", seed=seed, score=0.9 - lost[arm, seed], measures={name: values[arm, seed]},
            num_updates=int(updates[arm]), **template, **empty,
        )
        for arm in range(values.shape[0])
        for seed in range(values.shape[1])
    ]  # fmt: skip


def by_measure(found: list[Correlation]) -> dict[str, Correlation]:
    return {correlation.measure: correlation for correlation in found}


def test_against_scipy_on_the_means_of_arms():
    rng = np.random.default_rng(0)
    x, lost, updates = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)) / 100, rng.integers(10, 1000, 8)
    found = by_measure(correlations(runs_of(x, lost, updates)))["effective_rank/fc"]
    means = x.mean(1), lost.mean(1)
    assert found.r == pytest.approx(stats.spearmanr(*means).statistic)
    positions = [stats.rankdata(values) - 4.5 for values in (*means, updates)]
    u = positions[2]
    residuals = [v - u * (u @ v) / (u @ u) for v in positions[:2]]
    assert found.partial == pytest.approx(stats.pearsonr(*residuals).statistic)
    exact = stats.permutation_test(
        (means[0],), lambda v: stats.spearmanr(v, means[1]).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert found.p == pytest.approx(exact.pvalue, abs=1e-6)
    without = [stats.spearmanr(*(np.delete(v, arm) for v in means)).statistic for arm in range(8)]
    assert found.leave_one_out == pytest.approx((min(without), max(without)))


def test_arms_that_did_not_train_are_left_out():
    rng = np.random.default_rng(0)
    runs = runs_of(rng.normal(size=(8, 2)), rng.normal(size=(8, 2)), np.arange(1, 9))
    trained = {f"arm{arm}": {0, 1} if arm < 7 else set() for arm in range(8)}
    assert by_measure(correlations(runs, trained))["effective_rank/fc"].num_arms == 7


def test_under_seven_arms_there_is_no_interval():
    rng = np.random.default_rng(0)
    found = by_measure(correlations(runs_of(rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), np.arange(1, 7))))
    assert (found["effective_rank/fc"].interval, found["effective_rank/fc"].p) == (None, None)


def test_hard_seeds_are_no_correlation():
    """A seed on which both are low for every arm says nothing of what arms differ in."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 1, 4)
    noise = rng.normal(0, 0.01, (2, 5, 4))
    found = correlations(runs_of(seeds + noise[0], seeds + noise[1], np.arange(1, 6)))
    assert abs(by_measure(found)["effective_rank/fc"].r) < 0.5


@pytest.mark.parametrize("repeats", [0.0, 1.0], ids=["arms alone differ", "seeds, too"])
def test_false_alarms_are_at_most_five_percent(repeats):
    """However many seeds an arm has: they are no independent observations of what arms differ in."""
    rng = np.random.default_rng(0)
    num, alarms, covered = 200, 0, 0
    for _ in range(num):
        x, y = rng.normal(size=(2, 8, 1)) + repeats * rng.normal(size=(2, 8, 10))
        found = by_measure(correlations(runs_of(x, y / 100, np.full(8, 100))))["effective_rank/fc"]
        alarms += (found.p or 1.0) < 0.05
        low, high = found.interval or (-1, 1)
        covered += low <= 0 <= high
    assert alarms <= 0.08 * num
    assert covered >= 0.92 * num


def test_an_effect_of_updates_vanishes_when_updates_are_held_constant():
    rng = np.random.default_rng(0)
    updates = np.array([100, 200, 400, 800, 1600, 3200, 6400])
    driver = np.log(updates)[:, None]
    x, lost = (-driver + rng.normal(0, 1.5, (7, 3)) for _ in range(2))
    found = by_measure(correlations(runs_of(x, lost / 100, updates)))
    assert found["effective_rank/fc"].r > 0.6
    assert abs(found["effective_rank/fc"].partial or 1.0) < 0.6
    assert found["updates"].r < -0.7
    assert found["updates"].partial is None


def test_factors_are_taken_as_logarithms_and_what_does_not_vary_is_left_out():
    lost = np.array([[0.1], [0.2], [0.3], [0.4], [0.5]])
    scale = by_measure(correlations(runs_of(10 ** (10 * lost), lost, np.full(5, 7), "noise_scale")))
    assert scale["noise_scale"].r == pytest.approx(1)
    assert "updates" not in scale
    assert correlations(runs_of(np.ones((5, 1)), lost, np.full(5, 7))) == []
    assert correlations(runs_of(lost[:2], lost[:2], np.arange(1, 3))) == []
    three = by_measure(correlations(runs_of(lost[:3], lost[:3], np.full(3, 7))))["effective_rank/fc"]
    assert three.interval is None  # a line through three points says nothing of a fourth
