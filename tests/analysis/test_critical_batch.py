import numpy as np
import pytest

from gengap_dist.analysis.critical_batch import fit_curve, updates_to_target
from gengap_dist.analysis.results import Run
from tests.analysis.test_claims import BASE


def run(arm: str, seed: int, size: int, updates: int | None, status: str = "finished", **more) -> Run:
    empty = {"measures": {}, "own_batch": {}, "own_batch_untrained": {}, "num_probe_samples": 64}
    made = (
        {"num_updates": 1000, "num_epochs": 1.0, "settings": BASE, "score": 0.9, "target": "80.0% validation accuracy"}
        | empty
        | more
    )
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
    found = updates_to_target(runs, "b32")
    assert found is not None
    assert found.least_updates == pytest.approx(100, rel=0.01)
    assert found.critical_batch == pytest.approx(512, rel=0.01)
    assert found.missed == {"b512-lucky": 1, "b2048-wild": 1}
    assert found.updates["b512-lucky"] == {0: 10}
    assert found.noise_scale == 400.0


def test_no_target_no_curve():
    assert updates_to_target([run("a", 0, 8, None, target=None)], "a") is None
    assert updates_to_target([run("a", 0, 8, 5), run("b", 0, 16, 5, target="70.0% validation accuracy")], "a") is None
    two = updates_to_target([run("a", 0, 8, 5), run("b", 0, 16, 4)], "a")
    assert two is not None
    assert two.critical_batch is None


@pytest.mark.parametrize("updates", [[8000, 4000, 2000, 1000], [500, 500, 500, 500]], ids=["perfect", "flat"])
def test_a_critical_batch_that_nobody_came_near_is_not_told(updates):
    assert fit_curve([16, 32, 64, 128], updates) is None


def test_targets_that_were_there_from_the_start():
    assert updates_to_target([run(f"b{size}", 0, size, 0) for size in (8, 16, 32)], "b8") is not None
    some = updates_to_target([run(f"b{size}", 0, size, steps) for size, steps in ((8, 0), (16, 5), (32, 4))], "b8")
    assert some is not None
    assert some.critical_batch is None
