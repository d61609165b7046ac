"""Verdicts on simulated studies, whose truth is known."""

from collections import Counter

import numpy as np
import pytest

from gengap_dist.analysis.claims import claims
from gengap_dist.analysis.compare import compare
from gengap_dist.analysis.results import Claim, Run
from gengap_dist.statistics.paired import holm, minimum_detectable_effect, p_value, paired

NUM = 500
BASE = {"batch.global_size": 64, "optim.lr": 0.1, "train.epochs": 8, "algorithm.rank_penalty": None}
LARGE = BASE | {"batch.global_size": 1024}
PLAIN = {"sb": BASE, "lb256": BASE | {"batch.global_size": 256}, "lb1024": LARGE}
SCALED = {"lb1024-sqrt": LARGE | {"optim.scaling": "sqrt", "optim.base_size": 64}}
LONGER = {"lb1024-long": LARGE | {"train.length_unit": "updates", "optim.base_size": 64}}
RANK = {"algorithm.rank_penalty": 0.1, "algorithm.rank_layers": ["fc"]}
PENALISED = {"sb-rank": BASE | RANK, "lb1024-rank": LARGE | RANK}
FELL = {"lb1024": 0.1, "sb-rank": -0.1}  # near-rank loss where it grew, and where the penalty lowers it


def study(
    rng: np.random.Generator,
    settings: dict,
    *,
    num_seeds: int = 5,
    noise: float = 0.002,
    lost: dict[str, float] | None = None,
    grown: dict[str, float] | None = None,
    own: dict[str, float] | None = None,
) -> list[Run]:
    """Runs with what each arm loses of an accuracy of 0.9, and what its near-rank loss of 0.3 grows by, planted.

    Seeds have something in common: a hard seed is hard for all arms.
    """
    lost, grown, own = lost or {}, grown or {}, own or {}
    runs = []
    for seed in range(num_seeds):
        common = rng.normal(0, 0.01, 2)
        for arm, chosen in settings.items():
            size = chosen["batch.global_size"]
            long = chosen.get("train.length_unit") == "updates"
            loss = 0.3 + grown.get(arm, 0.0) + common[1] + rng.normal(0, noise)
            measures = {"near_rank_loss/fc/rel_1e-2": loss, "near_rank_loss/fc/abs_1e-2": loss / 2}
            runs.append(
                Run(
                    arm=arm,
                    seed=seed,
                    status="finished",
                    global_size=size,
                    num_updates=1000 * 64 // (64 if long else size),
                    num_epochs=8.0 * (size / 64 if long else 1),
                    settings=chosen,
                    score=0.9 - lost.get(arm, 0.0) + common[0] + rng.normal(0, noise),
                    measures=measures,
                    own_batch={"near_rank_loss/fc/rel_1e-2": 0.3 + own.get(arm, 0.0)} if own else {},
                    own_batch_untrained={"near_rank_loss/fc/rel_1e-2": 0.1 + own.get(arm, 0.0)} if own else {},
                    num_probe_samples=1024,
                    target=None,
                    updates_to_target=None,
                )
            )
    return runs


def verdict(runs: list[Run]) -> dict[str, Claim]:
    return {claim.key: claim for claim in claims(runs, "sb")}


def outcomes(settings: dict, num: int = NUM, **planted) -> dict[str, Counter]:
    rng = np.random.default_rng(0)
    found: dict[str, Counter] = {}
    for _ in range(num):
        claimed = verdict(study(rng, settings, **planted))
        for key, claim in claimed.items():
            found.setdefault(key, Counter())[claim.outcome] += 1
        supported = any(claim.outcome == "supported" for claim in claimed.values())
        found.setdefault("any", Counter())["supported"] += supported
    return found


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_intervals_cover_a_planted_gap(num_seeds):
    rng = np.random.default_rng(num_seeds)
    covered: Counter[str] = Counter()
    for _ in range(NUM):
        runs = study(rng, {"sb": BASE, "lb1024": LARGE}, num_seeds=num_seeds, lost={"lb1024": 0.02})
        by_arm = [{run.seed: run.score or 0.0 for run in runs if run.arm == arm} for arm in ("sb", "lb1024")]
        found = paired(by_arm[0], by_arm[1])
        for name in ("student", "bootstrap"):
            low, high = getattr(found, name)
            covered[name] += low <= 0.02 <= high
    assert 0.92 <= covered["student"] / NUM <= 0.98
    if num_seeds >= 8:  # below, the page says: read the t interval
        assert 0.92 <= covered["bootstrap"] / NUM <= 0.98


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_where_there_is_nothing_nothing_is_supported(num_seeds):
    found = outcomes(PLAIN | SCALED | LONGER | PENALISED, num_seeds=num_seeds)
    assert found["any"]["supported"] <= 0.05 * NUM
    assert found["any"]["supported"] > 0  # and yet it is chance, not a verdict that never falls


def test_a_planted_gap_is_found():
    found = outcomes(PLAIN, num=200, lost={"lb256": 0.0, "lb1024": 0.02}, grown={"lb1024": 0.1})
    assert found["gap"]["supported"] >= 190
    assert found["near_rank_loss_grows"]["supported"] >= 190
    assert found["explains"] == {"undecided": 200}  # nothing lowers near-rank loss: no cause is told


def test_what_only_the_own_batch_shows_supports_nothing():
    """The confound: singular values of a run's own batch shrink as it grows, those of the fixed set do not."""
    planted = {"lost": {"lb1024": 0.02}, "own": {"lb256": 0.2, "lb1024": 0.4}}
    found = outcomes(PLAIN | PENALISED, **planted)
    assert found["near_rank_loss_grows"]["supported"] <= 0.05 * NUM
    assert found["explains"]["supported"] <= 0.05 * NUM
    assert found["near_rank_loss_grows"]["contradicted"] > 0.5 * NUM
    assert found["explains"]["contradicted"] > 0.5 * NUM  # it did not grow where accuracy was lost
    claim = verdict(study(np.random.default_rng(1), PLAIN, **planted))["near_rank_loss_grows"]
    assert "own batch the change is: lb256 +0.200" in claim.evidence
    assert "in the untrained networks lb256 +0.200" in claim.evidence
    runs = [run._replace(measures={}) for run in study(np.random.default_rng(1), PLAIN, **planted)]
    claim = verdict(runs)["near_rank_loss_grows"]
    assert claim.outcome == "undecided"
    assert "only on each run's own batch" in claim.evidence


@pytest.mark.parametrize(
    ("lost", "grown", "expected"),
    [
        ({"lb1024": 0.02}, FELL, "supported"),
        ({"lb1024": 0.02, "lb1024-rank": 0.02}, FELL, "contradicted"),
        ({"lb1024": 0.02, "lb1024-rank": 0.018}, FELL, "contradicted"),
        ({"lb1024": 0.02}, FELL | {"lb1024-rank": 0.1}, "undecided"),
        ({"lb1024": 0.02, "lb1024-rank": 0.019}, FELL | {"lb1024-rank": 0.09}, "undecided"),
        ({"lb1024": 0.02, "lb1024-rank": 0.2}, FELL, "undecided"),
        ({"lb1024": 0.02, "lb1024-rank": 0.0, "sb-rank": -0.02}, FELL, "contradicted"),
        ({}, FELL, "undecided"),
    ],
    ids=[
        "accuracy comes back", "it does not", "little of it does", "nothing was lowered", "little was lowered",
        "too strong", "the small batch gains as much", "no gap",
    ],
)  # fmt: skip
def test_the_penalty_decides_what_explains_the_gap(lost, grown, expected):
    found = outcomes(PLAIN | PENALISED, num=200, lost=lost, grown=grown)["explains"]
    assert found[expected] >= 0.9 * 200
    wrong = {"supported": "contradicted", "contradicted": "supported"}.get(expected)
    assert wrong is None or found[wrong] <= 0.05 * 200


def test_what_the_penalty_does_for_the_baseline_must_be_known():
    found = outcomes(PLAIN | {"lb1024-rank": LARGE | RANK}, num=100, lost={"lb1024": 0.02}, grown=FELL)["explains"]
    assert found["supported"] == 0
    assert found["undecided"] >= 90


def test_penalties_on_different_layers_are_told_apart():
    other = {"lb1024-other": LARGE | {"algorithm.rank_penalty": 0.1, "algorithm.rank_layers": ["other"]}}
    runs = study(np.random.default_rng(0), PLAIN | PENALISED | other, lost={"lb1024": 0.02}, grown=FELL)
    added = {"near_rank_loss/other/rel_1e-2": 0.7, "near_rank_loss/other/abs_1e-2": 0.7}
    told = verdict([run._replace(measures={**run.measures, **added}) for run in runs])["explains"].evidence
    assert "lb1024-other changes near-rank loss by +0.000 (the same in all 5 pairs" in told


def test_only_layers_that_both_have_are_compared():
    """A baseline that was probed in one layer more, with less near-rank loss there, is not a growth elsewhere."""
    runs = study(np.random.default_rng(0), PLAIN)
    low = {"near_rank_loss/more/rel_1e-2": 0.0, "near_rank_loss/more/abs_1e-2": 0.0}
    runs = [run._replace(measures={**run.measures, **low}) if run.arm == "sb" else run for run in runs]
    assert verdict(runs)["near_rank_loss_grows"].outcome == "contradicted"


def test_probe_sets_of_another_size_are_not_compared():
    runs = study(np.random.default_rng(0), PLAIN, grown={"lb256": 0.1, "lb1024": 0.1})
    runs = [run._replace(num_probe_samples=64) if run.arm != "sb" else run for run in runs]
    assert verdict(runs)["near_rank_loss_grows"].outcome == "undecided"
    assert any("Probe sets differ in size" in caveat for caveat in compare(runs, "sb").caveats)


def test_arms_of_fewer_epochs_are_not_plain():
    runs = study(np.random.default_rng(0), PLAIN, lost={"lb256": 0.05, "lb1024": 0.05})
    assert verdict(runs)["gap"].outcome == "supported"
    short = [run._replace(num_epochs=2.0) if run.arm != "sb" else run for run in runs]
    assert verdict(short)["gap"].outcome == "undecided"


def test_equal_differences_have_no_spread_to_judge_by():
    runs = study(np.random.default_rng(0), {"sb": BASE, "lb1024": LARGE}, num_seeds=3)
    for lost in (0.05, 0.0):
        same = [run._replace(score=0.9 - lost * (run.arm != "sb")) for run in runs]
        found = compare(same, "sb")
        assert found.gaps["lb1024"].ci_half_width is None
        assert found.claims[0].outcome == "undecided"
        assert "pairs: no interval" in found.claims[0].evidence


def test_where_all_large_arms_diverged_that_is_said():
    runs = study(np.random.default_rng(0), PLAIN)
    runs = [run._replace(status="diverged", score=None) if run.arm != "sb" else run for run in runs]
    assert "No seed has a result" in verdict(runs)["gap"].evidence


def test_a_remedy_needs_a_twin_that_loses():
    """An arm of a batch that loses nothing resolves nothing; nor does length where the rate has done it all."""
    more = {"lb256-sqrt": PLAIN["lb256"] | {"optim.scaling": "sqrt", "optim.base_size": 64}}
    more["lb256-long"] = PLAIN["lb256"] | {"train.length_unit": "updates", "optim.base_size": 64}
    lost = {"lb1024": 0.04, "lb1024-sqrt": 0.04, "lb1024-long": 0.04}
    found = outcomes(PLAIN | SCALED | LONGER | more, num=100, lost=lost)
    assert found["scaling"]["contradicted"] + found["longer_training"]["contradicted"] <= 10
    both = {"lb1024-sqrt-long": SCALED["lb1024-sqrt"] | {"train.length_unit": "updates"}}
    found = outcomes(PLAIN | SCALED | both, num=100, lost={"lb1024": 0.04})
    assert found["scaling"]["contradicted"] >= 95
    assert found["longer_training"]["contradicted"] <= 5
    alone = outcomes(PLAIN | both, num=20, lost={"lb1024": 0.04})["longer_training"]
    assert alone == {"undecided": 20}


def test_remedies_leave_the_gap_or_close_it():
    lost = {"lb256": 0.02, "lb1024": 0.04, "lb1024-sqrt": 0.02, "lb1024-long": 0.0}
    found = outcomes(PLAIN | SCALED | LONGER, num=200, lost=lost)
    assert found["scaling"]["supported"] >= 190
    assert found["longer_training"]["contradicted"] >= 190
    wide = verdict(study(np.random.default_rng(0), PLAIN | LONGER, num_seeds=3, noise=0.01, lost=lost))
    assert wide["longer_training"].outcome == "undecided"


def test_thresholds_that_disagree_decide_nothing():
    runs = study(np.random.default_rng(0), PLAIN, grown={"lb256": 0.1, "lb1024": 0.1})
    assert verdict(runs)["near_rank_loss_grows"].outcome == "supported"
    turned = [
        run._replace(
            measures=run.measures | {"near_rank_loss/fc/abs_1e-2": 1 - run.measures["near_rank_loss/fc/rel_1e-2"]}
        )
        for run in runs
    ]
    claim = verdict(turned)["near_rank_loss_grows"]
    assert claim.outcome == "undecided"
    assert "opposite" in claim.evidence


def test_one_seed_concludes_nothing_and_says_so():
    runs = study(np.random.default_rng(0), PLAIN, num_seeds=1, lost={"lb1024": 0.3})
    found = compare(runs, "sb")
    assert found.gaps["lb1024"].paired.student is None
    assert found.gaps["lb1024"].ci_half_width is None
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    assert any("one pair of seeds" in caveat for caveat in found.caveats)


def test_what_is_lost_or_missing_is_said():
    runs = study(np.random.default_rng(0), PLAIN, num_seeds=3, lost={"lb1024": 0.02})
    runs = [
        run._replace(status="diverged", score=None, measures={}) if (run.arm, run.seed) == ("lb1024", 1) else run
        for run in runs
    ]
    runs = [run._replace(score=None) if (run.arm, run.seed) == ("lb256", 0) else run for run in runs]
    runs = [run._replace(measures={}) if (run.arm, run.seed) == ("lb256", 2) else run for run in runs]
    found = compare(runs, "sb")
    assert found.gaps["lb1024"].unfinished_runs == "1 diverged"
    assert sorted(found.gaps["lb1024"].paired.differences) == [0, 2]
    said = " ".join(found.caveats)
    assert "lb1024: 1 diverged" in said
    assert "no test accuracy: lb256" in said
    assert "not measured in every run: lb256" in said


def test_a_study_without_its_baseline_has_no_verdict():
    runs = study(np.random.default_rng(0), PLAIN)
    without = compare([run for run in runs if run.arm != "sb"], "sb")
    assert (without.gaps, without.claims) == ({}, [])
    assert "no finished run" in without.caveats[0]
    failed = compare([run._replace(status="failed") if run.arm == "sb" else run for run in runs], "sb")
    assert (failed.gaps, failed.claims) == ({}, [])


def test_matched_by_epochs_or_updates():
    found = compare(study(np.random.default_rng(0), PLAIN | LONGER), "sb").gaps
    assert found["lb1024"].matched == "epochs"
    assert found["lb1024-long"].matched == "updates"


def test_a_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    for num_pairs in (3, 5, 16):
        true = minimum_detectable_effect(1.0, num_pairs)
        drawn = rng.normal(true, 1.0, (4000, num_pairs))
        found = np.mean([(p_value(values) or 1.0) < 0.05 for values in drawn])
        assert found == pytest.approx(0.8, abs=0.02)


def test_holm_keeps_the_family_at_five_percent():
    rng = np.random.default_rng(0)
    alarms = sum(min(p for p in holm([*rng.uniform(size=10)]) if p is not None) < 0.05 for _ in range(2000))
    assert alarms / 2000 == pytest.approx(0.05, abs=0.015)
