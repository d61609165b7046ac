"""Means over seeds, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from gengap_dist.analysis.seed_aggregates import over_seeds, summary
from gengap_dist.config.identity import treatment
from gengap_dist.config.loading import flat, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.runs.metrics_table import to_table
from gengap_dist.runs.run_folder import SeedRun


def seed(number, accuracy=None, status="finished", lines=()):
    result = (
        {} if accuracy is None else {"test/accuracy": accuracy, "num_steps": 9, "probe_left_out": [], "time/data": 1}
    )
    return SeedRun({"seed": number, "status": status, "result": result}, to_table(lines))


@pytest.mark.parametrize("number", [2, 3, 7])
def test_the_interval_is_scipys(number):
    values = np.random.default_rng(number).normal(size=number)
    found = summary("x", list(values))
    low, high = stats.t.interval(0.95, number - 1, values.mean(), stats.sem(values))
    assert found == pytest.approx({"x/mean": values.mean(), "x/ci_low": low, "x/ci_high": high})


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [summary("x", list(rng.normal(5.0, 2.0, size=4))) for _ in range(1000)]
    covered = np.mean([line["x/ci_low"] <= 5.0 <= line["x/ci_high"] for line in found])
    assert 0.93 < covered < 0.97


def test_curves_have_the_steps_that_all_finished_seeds_have():
    def line(step, **values):
        return {"step": step, "seconds": float(step), "epoch": 0.0, **values}

    def at(x):
        both = {"val/accuracy": x, "train/loss": 1 - x, "near_rank_loss/fc2/rel_1e-2": x}
        both["near_rank_loss/fc2/centred/rel_1e-2"] = x  # what verdicts are about
        others = {"near_rank_loss/fc2/own_batch/rel_1e-2": x, "near_rank_loss/fc2/n64/rel_1e-2": x,
                  "effective_rank/fc2/centred": x, "effective_rank/fc2.affine/weight": x,
                  "near_rank_loss/fc2/rel_1e-3": x, "time/data": x}  # fmt: skip
        return [line(0, **both, **others), line(1, **{"train/loss": 0.0}), line(4, **both), line(5 + round(x), **both)]

    arm = [seed(0, 0.5, lines=at(0.0)), seed(1, 0.7, lines=at(1.0)), seed(2, status="diverged", lines=at(9.0))]
    lines = over_seeds(arm)
    assert [found["step"] for found in lines] == [0, 4]
    curves = {name.rpartition("/")[0] for name in lines[0] if name not in ("step", "seconds")}
    assert curves == {"val/accuracy", "train/loss", *(f"near_rank_loss/fc2{key}/rel_1e-2" for key in ("", "/centred"))}
    assert lines[0]["val/accuracy/mean"] == 0.5
    assert lines[1]["test/accuracy/mean"] == pytest.approx(0.6)
    assert lines[1]["test/accuracy/num_seeds"] == 2
    assert (lines[1]["num_runs/finished"], lines[1]["num_runs/diverged"]) == (2, 1)
    assert not [name for name in lines[1] if name.startswith("time/")]


def test_a_gap_is_paired_by_seed_and_lost_runs_are_counted():
    baseline = [seed(number, 0.9 + number / 100) for number in range(4)]
    arm = [seed(3, 0.83), seed(0, 0.8), seed(1, status="failed"), seed(2, status="failed")]
    (line,) = over_seeds(arm, baseline)
    assert line["sb_lb_gap/mean"] == pytest.approx(0.1)
    assert line["sb_lb_gap/num_seeds"] == 2
    assert line["num_runs/failed"] == 2
    assert over_seeds([seed(0, status="diverged")], baseline) == [{"step": 0, "seconds": 0.0, "num_runs/diverged": 1.0}]
    assert "test/accuracy/ci_low" not in over_seeds([seed(0, 0.5)])[0]


def test_a_treatment_says_what_differs_besides_the_batch():
    def settings(**given):
        return flat(validate(RunConfig, given))

    baseline = settings(batch={"global_size": 32})
    assert (
        treatment(settings(batch={"global_size": 512, "micro_size": 64}, seed=3, launch={"num_processes": 2}), baseline)
        == "plain"
    )
    scaled = settings(batch={"global_size": 512, "ghost_size": 32}, optim={"scaling": "sqrt", "base_size": 32})
    assert treatment(scaled, baseline) == "batch.ghost_size=32 optim.scaling=sqrt"
    other = settings(batch={"global_size": 512}, optim={"scaling": "sqrt", "base_size": 64}, data={"augment": ["flip"]})
    assert treatment(other, baseline) == 'data.augment=["flip"] optim.base_size=64 optim.scaling=sqrt'


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_curves_against_one_value_after_another(num_seeds):
    rng = np.random.default_rng(num_seeds)
    names = ["val/accuracy", "train/loss", "effective_rank/fc2", "nc1"]
    runs = [
        [
            {"step": step, "seconds": rng.random()} | {name: rng.normal() for name in names if rng.random() < 0.9}
            for step in range(30)
            if rng.random() < 0.9
        ]
        for _ in range(num_seeds)
    ]
    runs[0][3]["nc1"] = float("nan")
    found = {line["step"]: line for line in over_seeds([seed(n, 0.5, lines=lines) for n, lines in enumerate(runs)])}
    for step in range(30):
        here = [line for lines in runs for line in lines if line["step"] == step]
        shared = [name for name in names if len(here) == num_seeds and all(name in line for line in here)]
        if "val/accuracy" not in shared:
            shared = [name for name in shared if name != "train/loss"]
        expected = {}
        for name in shared:
            limits = (0.0, 1.0) if name == "val/accuracy" else (-np.inf, np.inf)
            expected |= summary(name, [line[name] for line in here], limits)
        curves = {
            name: value for name, value in found.get(step, {}).items()
            if name.rpartition("/")[0] in names and name.rpartition("/")[2] in ("mean", "ci_low", "ci_high")
        }  # fmt: skip
        assert curves == pytest.approx(expected, nan_ok=True)
        if shared:
            assert found[step]["seconds"] == pytest.approx(np.mean([line["seconds"] for line in here]))
