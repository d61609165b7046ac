import numpy as np
import pytest

from gengap_dist.comparison import Run
from gengap_dist.comparison.target import fit_curve, target_of
from tests.comparison.test_verdict import BASE


def run(arm: str, seed: int, size: int, updates: int | None, status: str = "finished", **more) -> Run:
    empty = {"measures": {}, "untrained": {}, "own_batch": {}, "own_batch_untrained": {}}
    made = {"num_updates": 1000, "num_epochs": 1.0, "settings": BASE, "accuracy": 0.9, "target": 0.8} | empty | more
    return Run(arm=arm, seed=seed, status=status, global_size=size, updates_to_target=updates, **made)


def test_the_interval_of_the_critical_batch_covers_it():
    rng = np.random.default_rng(0)
    sizes = np.repeat([16, 64, 256, 1024, 4096], 3)
    covered = 0
    for _ in range(300):
        updates = 100 * (1 + 500 / sizes) * np.exp(rng.normal(0, 0.1, len(sizes)))
        _, critical, interval = fit_curve(sizes, updates) or (0, 0, None)
        assert 250 < critical < 1000
        low, high = interval or (0, 0)
        covered += low <= 500 <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_fastest_arm_of_each_batch_that_always_gets_there_is_on_the_curve():
    exact = {size: round(100 * (1 + 512 / size)) for size in (32, 128, 512, 2048)}
    runs = [run(f"b{size}", seed, size, steps) for size, steps in exact.items() for seed in (0, 1)]
    runs += [run("b128-slow", seed, 128, 4000) for seed in (0, 1)]
    runs += [
        run("b512-lucky", 0, 512, 10),
        run("b512-lucky", 1, 512, None),
        run("b2048-wild", 0, 2048, None, "diverged"),
    ]
    runs += [run("b32", 2, 32, None, measures={"noise_scale": 400.0})._replace(status="running")]
    found = target_of(runs, "b32")
    assert found is not None
    assert found.least_updates == pytest.approx(100, rel=0.01)
    assert found.critical_batch == pytest.approx(512, rel=0.01)
    assert found.missed == {"b512-lucky": 1, "b2048-wild": 1}
    assert found.updates["b512-lucky"] == {0: 10}
    assert found.noise_scale == 400.0


def test_no_target_no_curve():
    assert target_of([run("a", 0, 8, None, target=None)], "a") is None
    assert target_of([run("a", 0, 8, 5), run("b", 0, 16, 5, target=0.7)], "a") is None
    two = target_of([run("a", 0, 8, 5), run("b", 0, 16, 4)], "a")
    assert two is not None
    assert two.critical_batch is None


def test_perfect_scaling_has_no_finite_critical_batch():
    """Where every doubling halves the updates, the data say only that B_crit is large: no fit, or a huge interval."""
    fit = fit_curve([16, 32, 64, 128], [8000, 4000, 2000, 1000])
    assert fit is None or fit[2] is None or fit[2][1] > 1e4
