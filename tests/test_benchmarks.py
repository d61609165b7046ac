"""The arithmetic of benchmarks/: when a ratio is printed, and what the simulated curves say."""

import doctest
import statistics
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.machine_constants import Constants, LinkConstants, workload_name
from gengap_dist.preflight.plan import make_plan
from tests.conftest import ROOT, config

sys.path.append(str(ROOT / "benchmarks"))  # as for a script that lies there
import baselines
import page
import paired_timing
import peers
import predicted


def test_examples_hold():
    found = doctest.testmod(paired_timing)
    assert found.attempted >= 4
    assert not found.failed


@pytest.mark.parametrize(
    ("rounds", "doubt"),
    [
        ([1.90, 1.95, 2.00, 2.00, 2.05, 2.10], ""),
        ([0.50, 1.95, 1.98, 1.99, 2.00, 2.01, 2.03, 2.05, 9.00], ""),  # one bad round at each end does not decide
        ([1.50, 1.70, 2.00, 2.00, 2.20, 2.50], "too noisy"),  # 1 wide, half of the median
        ([0.90, 0.95, 0.97, 0.97, 1.01, 1.05], "not told from 1"),
        ([0.955, 0.96, 0.97, 0.97, 0.975, 0.98], ""),  # all are below 1
        ([2.0, 2.0, 2.0, 2.0, 2.0], "too few rounds"),
    ],
)
def test_a_ratio_is_printed_only_where_noise_leaves_it_standing(rounds, doubt):
    drift = [10.0**number for number in range(len(rounds))]  # the machine's own, which both share in a round
    found = paired_timing.ratio([a * b for a, b in zip(rounds, drift, strict=True)], drift)
    assert found.doubt == doubt
    assert (found.low, found.high) == pytest.approx(paired_timing.interval(rounds))
    assert str(found).startswith(doubt or f"{statistics.median(rounds):.2f} ")


@pytest.mark.parametrize("num_rounds", [6, 7, 15, 40])
def test_the_interval_holds_the_median_as_often_as_it_says(num_rounds):
    random, times = np.random.default_rng(0), 4000
    inside = 0
    for _ in range(times):  # a skewed distribution, whose median is 1
        low, high = paired_timing.interval(np.exp(random.standard_normal(num_rounds)).tolist())
        inside += low < 1 < high
    assert inside / times > paired_timing.CONFIDENCE - 0.012  # three standard errors
    assert paired_timing.interval(range(num_rounds))[0] == {6: 0, 7: 0, 15: 3, 40: 13}[num_rounds]  # Conover, table A3


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None if name == "lightning" else find_spec(name))
    found = peers.about(baselines.WORKLOADS["mlp_4096"])
    assert found["missing"] == {"Lightning Trainer": "lightning"}
    speeds = {who: [1.0] * 6 for who in found["kinds"] if who not in found["missing"]}
    text = page.details({"mlp_4096": {**found, "images_per_second": {"2": speeds}}})
    assert "\n| Lightning Trainer | not installed |" in text


def test_peak_memory_alone_makes_a_page(tmp_path):
    about = peers.about(baselines.WORKLOADS["mlp_4096"])
    found = {**about, "images_per_second": {}, "peak_mib": dict.fromkeys(about["kinds"], 900.0), "data_mib": 45.0}
    (tmp_path / "benchmarks.md").write_text(
        "<!-- headline -->\n<!-- /headline -->\n<!-- memory -->\n<!-- /memory -->\n"
    )
    page.keep(tmp_path, "peers", {"mlp_4096": found})
    page.write(tmp_path)
    assert "\n| Lightning Trainer | 900 |\n" in (tmp_path / "benchmarks.md").read_text()
    assert not (tmp_path / "benchmarks" / "peers.svg").exists()


def test_contestants_take_turns_and_nobody_is_always_first():
    calls: list[str] = []

    def job(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = paired_timing.in_turns({name: lambda name=name: job(name) for name in "abc"}, 3)
    assert "".join(calls) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_the_machine_is_named():
    found = paired_timing.machine()
    assert found["cores"] >= 1
    assert str(found["cpu"]) in paired_timing.machine_summary(found)


@pytest.mark.parametrize("mode", predicted.MODES)  # weak: more images than there are, which plan refuses but predicts
def test_the_simulated_curve_is_what_plan_predicts(mode):
    links = predicted.ETHERNET
    last = predicted.curve(predicted.task("lenet5", 64), mode, predicted.ACCELERATOR, links)[-1]
    each = {"batch__micro_size": 64, "probe__enabled": False}
    run = config(model__name="lenet5", data__name="fashion_mnist", batch__global_size=last["global_size"], **each)
    inside, between = (LinkConstants(alpha=link.alpha, beta=link.beta) for link in (links.inside, links.between))
    compute = {workload_name(run, DataSpec.images(10, 1), last["global_size"] // 4096): predicted.ACCELERATOR}
    plan = make_plan(run, Cluster(512, 8), Constants(inside=inside, between=between, compute=compute))
    assert plan.time is not None
    assert last["ranks"] == plan.cluster.num_ranks == 4096
    assert last["seconds"] == plan.time.step
    assert bool(plan.refused) == (mode == "weak")
