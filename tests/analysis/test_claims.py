"""Verdicts on simulated studies, whose truth is known, and on studies that lack something."""

import math
import re
import sys

import numpy as np
import pytest

from gengap_dist.analysis.arm_roles import group_by_arm, roles, unscaled_counterpart
from gengap_dist.analysis.claims import judge
from gengap_dist.analysis.compare import compare
from gengap_dist.analysis.looks import look_of
from gengap_dist.analysis.results import Claim, Curve, Run
from gengap_dist.analysis.rules.intervention import Arms, Route, cost_of, gain_of, lowering_of, raising_of
from gengap_dist.analysis.rules.look import Look
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import holm, minimum_detectable_effect, p_value
from tests.conftest import FULL, ROOT

sys.path.append(str(ROOT / "benchmarks"))
import verdicts
from verdicts import BASE, LARGE, Ending, intervention, simulated_run, two_batches

NUM = 500 if FULL else 100

# (world, number of seeds, what is counted): lowest and highest share of the studies
EXPECTED = {
    ("updates", 3, "gap supported"): (0, 0.05),
    ("updates", 3, "near_rank_loss_grows supported"): (0, 0.05),
    ("updates", 3, "longer_training supported"): (0, 0.05),
    ("updates", 10, "gap supported"): (0, 0.05),
    ("updates", 10, "near_rank_loss_grows supported"): (0, 0.05),
    ("updates", 10, "longer_training supported"): (0, 0.05),
    ("phase", 5, "gap supported"): (0, 0),
    ("phase", 5, "gap cannot be matched"): (1, 1),
    ("phase", 10, "gap supported"): (0, 0),
    ("phase", 10, "gap cannot be matched"): (1, 1),
    ("gap", 5, "gap supported"): (0.79, 0.89),
    ("gap", 10, "gap supported"): (0.99, 1),
    ("gap_images", 5, "gap supported"): (0.70, 0.93),
    ("gap_images", 10, "gap supported"): (0.97, 1),
    ("gap_only", 5, "gap supported"): (0.99, 1),
    ("gap_only", 5, "near_rank_loss_grows supported"): (0, 0.05),
    ("diverged", 10, "gap supported"): (0, 0),
    ("diverged", 10, "gap contradicted"): (0, 0),
    ("share_0", 5, "explains supported"): (0, 0.01),
    ("share_0", 5, "explains contradicted"): (0.70, 0.82),
    ("share_0", 10, "explains supported"): (0, 0.01),
    ("share_0", 10, "explains contradicted"): (0.98, 1),
    ("share_0_one_route", 10, "explains not asked"): (1, 1),
    ("share_half", 5, "explains supported"): (0, 0.02),
    ("share_half", 5, "explains contradicted"): (0, 0.02),
    ("share_half", 10, "explains supported"): (0, 0.02),
    ("share_half", 10, "explains contradicted"): (0, 0.02),
    ("share_60", 5, "explains supported"): (0, 0.02),
    ("share_60", 5, "explains contradicted"): (0, 0.02),
    ("share_60", 10, "explains supported"): (0, 0.02),
    ("share_60", 10, "explains contradicted"): (0, 0.02),
    ("both_fall", 5, "explains supported"): (0, 0.02),
    ("both_fall", 5, "explains contradicted"): (0, 0.02),
    ("both_fall", 10, "explains supported"): (0, 0.02),
    ("both_fall", 10, "explains contradicted"): (0, 0.02),
    ("share_1", 5, "explains supported"): (0.70, 0.82),
    ("share_1", 10, "explains supported"): (0.98, 1),
    ("share_1_machinery", 5, "explains supported"): (0.70, 0.82),
    ("share_1_machinery", 10, "explains supported"): (0.98, 1),
    ("better", 10, "explains supported"): (0, 0),
    ("no_growth", 10, "explains supported"): (0, 0),
    ("no_growth", 10, "explains contradicted"): (0.45, 0.57),
    ("speed", 10, "explains not asked"): (1, 1),
    ("hidden", 5, "explains supported"): (0, 0.01),
    ("hidden", 10, "explains supported"): (0, 0.01),
    ("placebo", 10, "explains not asked"): (1, 1),
}


@pytest.mark.parametrize(
    ("world", "num_seeds"), [(name, n) for name, world in verdicts.WORLDS.items() for n in world.num_seeds]
)
def test_simulated_studies_are_judged_as_their_truth_is(world, num_seeds):
    """The shares of the specification, within what so many studies can tell (three standard errors)."""
    counted = verdicts.WORLDS[world].counted
    for entry, number in zip(counted, verdicts.counts(world, num_seeds, NUM), strict=True):
        if (world, num_seeds, entry) in EXPECTED:
            low, high = EXPECTED[world, num_seeds, entry]
            error = [3 * math.sqrt(share * (1 - share) / NUM) for share in (low, high)]
            assert low - error[0] <= number / NUM <= high + error[1], entry


def of(runs: list[Run], key: str, **options: object) -> Claim:
    return next(claim for claim in judge(runs, "sb", **options).claims if claim.key == key)  # type: ignore[arg-type]


def study(lost: float = 1.72, num_seeds: int = 5, seed: int = 0, **options) -> list[Run]:
    return intervention(np.random.default_rng(seed), num_seeds, lost=lost, **options)


def changed(runs: list[Run], arm: str, seeds: range | None = None, **fields: object) -> list[Run]:
    return [run._replace(**fields) if run.arm == arm and (seeds is None or run.seed in seeds) else run for run in runs]


# -- looks ------------------------------------------------------------------------------------------------------------


def test_a_look_that_was_declared_later_or_repeated_is_not_declared():
    """Judged first at 3 seeds, or at 10 other ones: the level of the declared looks does not hold for these."""
    assert look_of(range(10), [[0, 1, 2]], {"looks": [10, 20]}).by_e_value
    assert look_of(range(10, 20), [[*range(10)]], {"looks": [10, 20]}).by_e_value
    assert look_of(range(20), [[*range(10)]], {"looks": [10, 20]}).level == 0.043
    assert look_of(range(5, 15), [[*range(10)]], {"may_extend": True}).level == 0.05


@pytest.mark.parametrize(
    ("section", "num_ever"), [({"looks": [10, 20]}, (10, 20)), ({"may_extend": True}, range(3, 21)), ({}, range(3, 21))]
)
def test_looking_again_supports_nothing_in_five_percent_of_studies(section, num_ever):
    """No gap at all: how often does any look see one? Undeclared extensions are judged by e-values, up to 6.4%."""
    rng = np.random.default_rng(0)
    num_studies, alarms = 2000, 0
    for _ in range(num_studies):
        values, judged = rng.normal(size=20), []
        for n in num_ever:
            look = look_of(range(n), judged, section)
            judged.append([*range(n)])
            interval = look.interval(values[:n])
            if interval and not interval[0] <= 0 <= interval[1]:
                alarms += 1
                break
    allowed = 0.05 if section else 0.064
    assert alarms / num_studies <= allowed + 2 * math.sqrt(allowed / num_studies)


def test_a_study_is_judged_at_its_declared_looks_only():
    runs = study(num_seeds=7)
    look = look_of(range(7), [], {"looks": [5, 10]})
    found = compare(runs, "sb", look=look)
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    assert "with 7 nothing is judged" in found.caveats[0]
    assert look_of(range(5), [], {"looks": [5, 10]}).level == 0.01


def test_an_extension_that_was_not_declared_is_said():
    look = look_of(range(8), [[0, 1, 2]], {})
    assert "this look was not declared" in compare(study(num_seeds=8), "sb", look=look).caveats[0]


# -- training ---------------------------------------------------------------------------------------------------------


def test_runs_at_chance_are_named_and_decide_nothing():
    runs = two_batches(np.random.default_rng(0), 3, lost=70.0)
    runs = changed(runs, "lb", train_score=0.12, train_loss=2.3)
    found = judge(runs, "sb")
    assert str(found.training["lb"]) == "did not train in 3 of 3"
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    assert found.claims[0].finding == "did not train"
    assert "did not train in 3 of 3" in found.answer


def test_a_baseline_that_did_not_train_decides_nothing():
    runs = two_batches(np.random.default_rng(0), 3, lost=-70.0)
    runs = changed(runs, "sb", train_score=0.12, train_loss=2.3)
    found = judge(runs, "sb")
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    assert found.answer == "Nothing can be said: the baseline (sb) did not train."


@pytest.mark.parametrize(
    ("more", "label"), [(0.0, "as well"), (-0.05, "less"), (0.05, "more")], ids=["as well", "less", "more"]
)
def test_labels_of_training(more, label):
    runs = two_batches(np.random.default_rng(0), 5)
    runs = [run._replace(train_score=0.9 + more * (run.arm == "lb") + 1e-4 * run.seed) for run in runs]
    assert judge(runs, "sb").training["lb"].label == label


def test_where_every_large_run_diverged_that_is_said():
    runs = [
        run._replace(status="diverged", score=None, near_rank_loss=None) if run.arm == "lb" else run
        for run in two_batches(np.random.default_rng(0), 5)
    ]
    found = judge(runs, "sb")
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    text = "Not answered: batch 2,048 (lb) did not train in 5 of 5 runs. Lower the learning rate."
    assert found.answer == text


def test_runs_that_did_not_train_are_told_in_one_sentence_with_what_to_do():
    runs = two_batches(np.random.default_rng(0), 3, lost=70.0)
    runs = changed(runs, "lb", train_score=0.12, train_loss=2.3)
    runs = changed(runs, "sb", range(1), train_score=0.12, near_rank_loss_untrained=0.5)
    found = judge(runs, "sb")
    assert found.answer == (
        "Not answered: batch 2,048 (lb) did not train in 3 of 3 runs and the baseline sb in 1 of 3. Train longer."
    )
    runs = changed(runs, "sb", near_rank_loss_untrained=0.5)
    assert "(of the 2 runs that trained)" in of(runs, "near_rank_loss_grows").evidence


def test_an_answer_has_the_level_and_the_population_of_its_interval():
    runs = two_batches(np.random.default_rng(0), 10, lost=3.0)
    look = look_of(range(10), [], {"looks": [10, 20]})
    assert re.search(
        r"loses [\d.]+ \[[\d., ]+\] points \(99%, .+\) at equal training", judge(runs, "sb", look=look).answer
    )
    unsure = judge(two_batches(np.random.default_rng(0), 10, lost=0.5), "sb").answer
    start = r"Not decided: batch 2,048 \(lb\) loses [\d.]+ \[-?[\d.]+, [\d.]+\] points \(95%, these test samples\)"
    assert re.match(start + r" at equal training; a loss of [\d.]+ would be found four times in five\.", unsure)
    never = judge(runs, "sb", look=look_of(range(10), [], {"looks": [5, 20]})).answer
    assert re.match(
        r"Not decided: .* at the end.*Looks were declared at 5 and 20 seeds: with 10 nothing is judged\.", never
    )
    assert "inf" not in never


def test_a_difference_that_no_share_can_have_is_not_named():
    runs = two_batches(np.random.default_rng(0), 2)
    assert any("points (95% intervals on these test samples" in caveat for caveat in compare(runs, "sb").caveats)
    runs = changed(changed(runs, "lb", range(1), score=0.1), "lb", range(1, 2), score=0.9)
    assert "With 2 seeds no difference can be significant." in compare(runs, "sb").caveats


def test_seeds_that_only_some_arms_have_keep_a_verdict_from_standing():
    runs = [run for run in two_batches(np.random.default_rng(0), 10, lost=3.0) if run.arm == "sb" or run.seed < 5]
    claim = of(runs, "gap")
    assert claim.outcome == "undecided"
    assert "5 of 10 pairs are missing" in claim.evidence


def test_two_noisy_seeds_leave_training_unclear():
    runs = [
        run._replace(train_score=0.9 + (-0.02, 0.03)[run.seed] * (run.arm == "lb"))
        for run in two_batches(np.random.default_rng(0), 2)
    ]
    assert judge(runs, "sb").training["lb"].label == "unclear"


def test_one_run_that_did_not_train_keeps_a_verdict_from_standing():
    """Whatever it had found must leave the verdict: with an accuracy of 0 or 100% it would not."""
    runs = two_batches(np.random.default_rng(0), 8, lost=3.0)
    assert of(runs, "gap").outcome == "supported"
    claim = of(changed(runs, "lb", range(1), status="diverged", score=None), "gap")
    assert claim.outcome == "undecided"
    assert "1 of 8 pairs are missing" in claim.evidence


# -- the gap ----------------------------------------------------------------------------------------------------------


def test_outcomes_by_the_margin():
    rng = np.random.default_rng(0)
    assert of(two_batches(rng, 20, lost=0.25), "gap").finding == "there, but below the margin"
    assert of(two_batches(rng, 20, lost=0.0), "gap").finding == "below the margin"
    assert of(two_batches(rng, 20, lost=0.0), "gap").outcome == "contradicted"
    assert of(two_batches(rng, 20, lost=1.0), "gap", margin=0.02).finding == "there, but below the margin"


def test_what_is_lost_is_parted_into_training_and_generalization():
    runs = [
        run._replace(train_score=0.95 - 0.02 * (run.arm == "lb")) for run in two_batches(np.random.default_rng(0), 5)
    ]
    runs = changed(runs, "lb", train_loss=1.0)
    claim, answer = of(runs, "gap"), judge(runs, "sb").answer
    assert claim.finding == "cannot be matched"
    assert "2.00 (the same in all 5 pairs) on training samples plus" in claim.evidence
    assert "and it is trained less: it is not shown to generalize worse" in answer  # less is lost than in training
    runs = changed(runs, "lb", score=0.7)
    assert "of which 2.00 on training samples too: it is trained less" in judge(runs, "sb").answer


def test_arms_matched_by_the_curve_need_a_negative_control():
    """The curves of a batch that acts through updates only agree, where a control of other updates is there."""
    rng = np.random.default_rng(0)
    settings = BASE | {"optim.schedule": "constant"}
    arms = {"sb": (settings, 1230), "lb": (settings | {"batch.global_size": 64}, 800)}
    control = {"sb-half": (settings | {"train.epochs": 12.5}, 615)}

    def runs_of(arms: dict) -> list[Run]:
        return [
            simulated_run(
                rng, arm, seed, chosen,
                Ending(
                    70, 95 if arm == "sb" else 90, 2.3 * math.exp(-updates / 150), updates=updates,
                    curve=verdicts.learning_curve(rng, updates, verdicts.accuracy_of_loss, cosine=False),
                ),
            )
            for arm, (chosen, updates) in arms.items()
            for seed in range(5)
        ]  # fmt: skip

    without = of(runs_of(arms), "gap", margin=0.03)
    assert without.finding == "cannot be matched"
    assert "needs a negative control" in without.evidence
    claim = of(runs_of(arms | control), "gap", margin=0.03)
    assert "at equal training, on these validation samples" in claim.evidence
    assert claim.finding == "below the margin"


def test_runs_recorded_before_curves_are_judged_by_what_they_have():
    runs = [run._replace(train_score=None, train_loss=None, chance=None) for run in study()]
    found = judge(runs, "sb")
    assert found.training["lb"].label == "not measured"
    assert found.claims[0].finding == "cannot be matched"
    assert "no curve of both was recorded" in found.claims[0].evidence


def test_equal_differences_have_no_spread_to_judge_by():
    runs = two_batches(np.random.default_rng(0), 3)
    same = [run._replace(score=0.9 - 0.05 * (run.arm != "sb")) for run in runs]
    claim = compare(same, "sb").claims[0]
    assert claim.outcome == "undecided"
    assert "the same in all 3 pairs" in claim.evidence


def test_probe_sets_of_another_size_are_not_compared():
    runs = two_batches(np.random.default_rng(0), 5, growth=0.3)
    assert of(runs, "near_rank_loss_grows").outcome == "supported"
    other = changed(runs, "lb", num_probe_samples=64)
    assert of(other, "near_rank_loss_grows").outcome == "undecided"
    assert any("Probe sets differ in size" in caveat for caveat in compare(other, "sb").caveats)


def test_the_own_batch_is_shown_since_the_untrained_network_and_decides_nothing():
    runs = two_batches(np.random.default_rng(0), 5, growth=0.0)
    own = {"near_rank_loss/fc/rel_1e-2": 0.4}
    runs = [
        run._replace(
            own_batch={name: value + 0.3 * (run.arm == "lb") for name, value in own.items()},
            own_batch_untrained={name: value + 0.1 * (run.arm == "lb") for name, value in own.items()},
        )
        for run in runs
    ]
    claim = of(runs, "near_rank_loss_grows")
    assert claim.outcome != "supported"
    assert "which decides nothing: lb +0.200" in claim.evidence


def test_a_difference_in_loss_that_is_worth_much_is_no_match():
    """600 and 530 updates of one world: losses within a factor of 2, and a test score that falls by 12 for each e."""
    rng = np.random.default_rng(0)
    arms = {"sb": (BASE | {"optim.schedule": "constant"}, 600)}
    arms["lb"] = arms["sb"][0] | {"batch.global_size": 64}, 530
    runs = []
    for arm, (chosen, updates) in arms.items():
        loss = 2.3 * math.exp(-updates / 150)
        test = float(verdicts.accuracy_of_loss(np.array([loss]), np.ones(1))[0])
        for seed in range(5):
            curve = verdicts.learning_curve(rng, updates, verdicts.accuracy_of_loss, cosine=False)
            end = Ending(test, 98.0, loss, updates=updates, curve=curve)
            runs.append(simulated_run(rng, arm, seed, chosen, end))
    claim = of(runs, "gap")
    assert claim.finding == "cannot be matched"


def test_curves_that_were_measured_too_rarely_are_not_compared():
    """Scores that bend with the loss, and 8 measurements: between two of them a straight line is off by points."""
    rng = np.random.default_rng(0)
    settings = BASE | {"optim.schedule": "constant"}
    arms = {"sb": (settings, 1230), "lb": (settings | {"batch.global_size": 64}, 800)}
    arms["sb-half"] = settings | {"train.epochs": 12.5}, 850
    runs = []
    for arm, (chosen, updates) in arms.items():
        for seed in range(5):
            steps = np.unique(np.round(np.geomspace(1, updates, 8)))
            losses = 2.3 * np.exp(-steps / 150) * np.exp(rng.normal(0, 0.01, len(steps)))
            scores = 0.8 - 0.1 * np.sqrt(losses) + rng.normal(0, 0.001, len(steps))
            curve = Curve(steps, losses, scores, np.full(len(steps), 0.1), np.ones(len(steps)))
            end = Ending(80, 95 if arm == "sb" else 90, float(losses[-1]), updates=updates, curve=curve)
            runs.append(simulated_run(rng, arm, seed, chosen, end))
    claim = of(runs, "gap")
    assert claim.finding == "cannot be matched"
    assert "measured too rarely near this loss)" in claim.evidence
    runs = [run._replace(num_skipped=9 + 10 * (run.arm == "lb")) for run in runs]
    remedy = "run again with --probe.max_time_fraction null"
    text = f"near this loss: probe.max_time_fraction left out 9 to 19 measurements of a run; {remedy})"
    assert text in of(runs, "gap").evidence
    assert any(
        "9 to 19 measurements in 15 of 15 runs" in caveat and remedy in caveat for caveat in compare(runs, "sb").caveats
    )


def test_an_arm_without_near_rank_loss_keeps_growth_from_being_contradicted():
    rng = np.random.default_rng(0)
    runs = two_batches(rng, 10, growth=-0.2)
    more = BASE | {"batch.global_size": 4096}
    runs += [simulated_run(rng, "lb4096", seed, more, Ending(82))._replace(near_rank_loss=None) for seed in range(10)]
    claim = of(runs, "near_rank_loss_grows")
    assert claim.outcome == "undecided"
    assert "lb4096: cannot be matched (near-rank loss of both was not measured" in claim.evidence


def test_images_that_no_run_gets_otherwise_are_not_certain():
    """20 images, all correct in both arms: up to 17 in 100 new ones may still differ."""
    runs = two_batches(np.random.default_rng(0), 3, lost=0.0)
    runs = [run._replace(test_correct=np.ones(20, dtype=bool), score=1.0, train_score=1.0) for run in runs]
    claim = of(runs, "gap")
    assert claim.finding == ""
    assert "[-16.84, 16.84]" in claim.evidence


def test_results_that_are_missing_are_not_passed_over():
    runs = two_batches(np.random.default_rng(0), 8, lost=3.0)
    claim = of(changed(runs, "lb", range(3), score=None), "gap")
    assert (claim.outcome, "3 of 8 pairs are missing" in claim.evidence) == ("undecided", True)


def test_an_answer_speaks_for_every_length_of_a_batch():
    rng = np.random.default_rng(0)
    runs = two_batches(rng, 10, lost=0.0)
    long = LARGE | {"train.epochs": 50.0}
    runs += [simulated_run(rng, "lb-long", seed, long, Ending(80.5, updates=1600)) for seed in range(10)]
    answer = judge(runs, "sb").answer
    assert not answer.startswith("Up to batch")
    assert "batch 2,048 (lb-long) loses" in answer


def test_a_gain_is_called_a_gain():
    runs = two_batches(np.random.default_rng(0), 10, lost=-2.0)
    assert "lb gains 1.9" in of(runs, "gap").evidence


# -- remedies ---------------------------------------------------------------------------------------------------------

SQRT = LARGE | {"optim.lr": 0.16}
LONG = LARGE | {"train.epochs": 50.0}


def with_remedies(left: float, num_seeds: int = 6, updates: int = 1600) -> list[Run]:
    rng = np.random.default_rng(1)
    runs = two_batches(rng, num_seeds, lost=10.0)
    for arm, settings in (("lb-sqrt", SQRT), ("lb-long", LONG)):
        end = Ending(verdicts.ACCURACY - left, updates=updates)
        runs += [simulated_run(rng, arm, seed, settings, end) for seed in range(num_seeds)]
    return runs


@pytest.mark.parametrize(
    ("left", "finding", "outcome"),
    [
        (0.0, "resolves it", "contradicted"),
        (1.0, "closes it mostly", "undecided"),
        (5.0, "closes it partly", "undecided"),
        (9.5, "does not", "supported"),
    ],
)
def test_remedies_are_graded(left, finding, outcome):
    for key in ("scaling", "longer_training"):
        claim = of(with_remedies(left), key)
        assert (claim.finding, claim.outcome) == (finding, outcome)


def test_longer_training_is_asked_with_the_updates_of_the_baseline_only():
    claim = of(with_remedies(9.5, updates=180), "longer_training")
    assert (claim.outcome, claim.finding) == ("undecided", "not asked")
    assert "180 of 1,600 updates" in claim.evidence


def test_a_remedy_needs_a_counterpart_that_loses():
    runs = [run for run in with_remedies(0.0) if run.arm != "lb"]
    assert "has no arm without the remedy" in of(runs, "scaling").evidence
    rng = np.random.default_rng(0)
    runs = two_batches(rng, 5, lost=0.0)
    runs += [simulated_run(rng, "lb-sqrt", seed, SQRT, Ending(verdicts.ACCURACY)) for seed in range(5)]
    assert of(runs, "scaling").finding == "not asked"


# -- interventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda runs: [run for run in runs if "placebo" not in run.arm], "has no placebo"),
        (lambda runs: [run for run in runs if run.arm != "sb-lower"], "no arm lowers the rank of sb"),
        (lambda runs: [run for run in runs if run.arm != "sb-logdet"], "no arm of sb has the penalty of lb-logdet"),
        (
            lambda runs: [
                run._replace(settings={**run.settings, "algorithm.rank_penalty": 0.02})
                if run.arm == "sb-logdet"
                else run
                for run in runs
            ],
            "with its strength and images",
        ),
        (
            lambda runs: [
                run._replace(settings={**run.settings, "algorithm.rank_images": 64}) if run.arm == "sb-logdet" else run
                for run in runs
            ],
            "no arm of sb has the penalty of lb-logdet",
        ),
        (
            lambda runs: [
                run._replace(settings={**run.settings, "algorithm.rank_images": 64}) if "placebo" in run.arm else run
                for run in runs
            ],
            "has no placebo with the same layers and images",
        ),
        (lambda runs: changed(runs, "lb-logdet", range(1), status="diverged", score=None), "did not train in 1 of 10"),
        (lambda runs: [run for run in runs if run.arm != "sb-lower" or run.seed < 5], "not all of its arms have all"),
    ],
)
def test_an_intervention_that_lacks_something_is_not_asked(change, reason):
    runs = study(num_seeds=10)
    assert of(runs, "explains").finding == "explains less than half"
    claim = of(change(runs), "explains")
    assert (claim.outcome, claim.finding) == ("undecided", "not asked")
    assert reason in claim.evidence


def test_two_strengths_of_one_measure_are_one_route():
    runs = [
        run._replace(settings={**run.settings, "algorithm.rank_measure": "logdet", "algorithm.rank_penalty": 0.011})
        if run.arm.endswith("spread")
        else run
        for run in study(num_seeds=10, hidden_gain=(1.9, 1.9), hidden_cost=1.9)
    ]
    runs = [
        run._replace(settings={**run.settings, "algorithm.rank_penalty": 0.011}) if "placebo" in run.arm else run
        for run in runs
    ]
    claim = of(runs, "explains")
    assert (claim.outcome, claim.finding) == ("undecided", "not asked")
    assert "only one way to raise the rank" in claim.evidence


def test_a_placebo_must_be_as_strong_as_the_penalty():
    runs = [
        run._replace(settings={**run.settings, "algorithm.rank_penalty": 1e-9}) if "placebo" in run.arm else run
        for run in study(num_seeds=10)
    ]
    claim = of(runs, "explains")
    assert claim.finding == "not asked"
    assert "at least its strength" in claim.evidence


@pytest.mark.parametrize(("norm", "is_asked"), [(0.05, True), (0.049, False)])
def test_a_placebo_is_as_strong_as_a_penalty_if_its_gradient_is_as_long(norm, is_asked):
    """Strengths of different measures are not comparable; the lengths of the gradients that runs record are."""
    norms = {"logdet": 0.05, "spread": 0.04, "lower": 0.03, "placebo": norm}
    runs = [
        run._replace(penalty_norm=next((each for name, each in norms.items() if name in run.arm), None))
        for run in study(num_seeds=10)
    ]
    claim = of(runs, "explains")
    assert (claim.finding != "not asked") == is_asked
    assert ("at least its strength and gradient norm" in claim.evidence) != is_asked


def test_a_batch_that_hardly_trained_leaves_the_claim_open():
    """Of a second large batch only one run trained: that says nothing of what it loses."""
    runs = study(num_seeds=10, share=1.0)
    assert of(runs, "explains").outcome == "supported"
    lost = [
        run._replace(arm="lb-other", settings={**run.settings, "batch.global_size": 1024}, global_size=1024)
        for run in runs
        if run.arm == "lb"
    ]
    lost = [run if run.seed == 0 else run._replace(status="diverged", score=None) for run in lost]
    assert of([*runs, *lost], "explains").outcome == "undecided"


def test_survivors_do_not_say_that_near_rank_loss_does_not_grow():
    runs = two_batches(np.random.default_rng(0), 10, growth=-0.03)
    assert of(runs, "explains").finding == "does not grow"
    assert of(changed(runs, "sb", range(5), status="diverged", score=None), "explains").outcome == "undecided"


@pytest.mark.parametrize(("value", "finding"), [(0.0, "not asked"), (0.001, "does not grow")])
def test_a_measure_that_counts_nothing_asks_nothing(value, finding):
    """Near-rank loss that is 0 in every run may be that of a threshold too low, not of activations of full rank."""
    runs = [run._replace(near_rank_loss=value) for run in study(num_seeds=10)]
    claim, caveats = of(runs, "explains"), " ".join(compare(runs, "sb").caveats)
    assert (claim.finding, of(runs, "near_rank_loss_grows").outcome) == (finding, "contradicted")
    assert ("its measure counts nothing" in claim.evidence) == (value == 0) == ("counts nothing here" in caveats)
    assert ("is not the cause" in judge(runs, "sb").answer) == (value > 0)


def test_a_measure_that_an_intervention_moves_counts():
    """Near-rank loss is 0 without a penalty at both batches, and .4 where it is lowered: then it does not grow."""
    runs = [run._replace(near_rank_loss=0.4 if run.arm == "sb-lower" else 0.0) for run in study(num_seeds=10)]
    assert of(runs, "explains").finding == "does not grow"


def test_growth_that_cancels_over_seeds_divides_nothing():
    up_and_down = [
        run._replace(near_rank_loss=0.5 + 0.1 * (-1) ** run.seed * (run.arm == "lb")) for run in study(num_seeds=10)
    ]
    claim = of(up_and_down, "explains")
    assert claim.finding == "not asked"
    assert "nan" not in claim.evidence
    (found,) = judge(up_and_down, "sb").interventions
    assert all(np.isfinite(each.mean) for each in found.estimates)
    assert not [each.quantity for each in found.estimates if each.quantity.startswith(("raising", "lowering"))]


def test_the_share_of_the_loss_through_the_rank_is_printed():
    claim = of(study(num_seeds=10, share=1.0), "explains")
    assert claim.finding == "explains most"
    assert "of the loss" in claim.evidence
    assert judge(study(num_seeds=10, share=1.0), "sb").answer.endswith(
        "Near-rank loss explains most of the loss of large batches."
    )


def test_routes_that_reach_the_same_rank_and_another_accuracy_disagree():
    found = [
        of(study(num_seeds=10, seed=seed, share=0.3, hidden_gain=(0.0, 1.34)), "explains").finding for seed in range(20)
    ]
    assert found.count("routes disagree") >= 15


def test_the_numbers_of_an_intervention_stand_beside_its_verdict():
    runs = study(num_seeds=10, hidden_gain=(0.0, 1.34))
    (result,) = compare(runs, "sb").interventions
    assert (result.arm, result.num_seeds, result.finding) == ("lb", 10, of(runs, "explains").finding)
    assert all(each.holds for each in result.requirements)
    score = {arm.name: arm.scores() for arm in group_by_arm(runs).values()}
    gains = [
        score["lb-spread"][at] - score["lb-placebo"][at] - score["sb-spread"][at] + score["sb-placebo"][at]
        for at in range(10)
    ]
    apart = [score["lb-spread"][at] - score["lb-logdet"][at] for at in range(10)]
    found = {each.quantity: each for each in result.estimates}
    for quantity, values in (("gain by lb-spread", gains), ("lb-spread minus lb-logdet", apart)):
        assert found[quantity].mean == pytest.approx(np.mean(values))
        assert found[quantity].interval == pytest.approx(Look().interval(values))
    text = of(runs, "explains").evidence
    for name in ("gain by lb-logdet", "cost of sb-lower", "raising by lb-spread"):
        assert f"{100 * found[name].mean:.2f} [" in text


def test_the_condition_that_is_named_is_the_first_that_does_not_hold():
    runs = study(num_seeds=10, placebo_small=1.5)
    claim = of(runs, "explains")
    (result,) = compare(runs, "sb").interventions
    assert claim.finding == result.finding == "not asked"
    assert "at the small batch lb-logdet and its placebo may differ" in claim.evidence
    failed = [each.estimate.quantity for each in result.requirements if not each.holds]
    assert failed[0] == "sb-logdet against sb-placebo"
    assert result.reason in claim.evidence


def test_arms_that_train_less_are_a_condition_and_keep_their_numbers():
    runs = study(num_seeds=10, training_gain=3.0)
    (result,) = compare(runs, "sb").interventions
    assert result.finding == "not asked"
    failed = [each.estimate.quantity for each in result.requirements if not each.holds]
    assert failed[0] == "lb against sb on training samples"
    assert {each.quantity for each in result.estimates} >= {"lost", "growth", "cost of sb-lower"}
    assert compare(two_batches(np.random.default_rng(0), 10), "sb").interventions == []


def test_the_quantities_of_an_intervention_against_loops_over_seeds():
    """Gain, fall, cost and rise by their definitions, one seed after the other."""
    rng = np.random.default_rng(0)
    names = ("S0", "L0", "S-", "Sp", "L+", "S+", "Lp", "Sq")
    a, r = ({name: rng.normal(size=6) for name in names} for _ in range(2))
    scores, ranks = (
        Arms(of["S0"], of["L0"], of["S-"], of["Sp"], [Route("one", "logdet", of["L+"], of["S+"], of["Lp"], of["Sq"])])
        for of in (a, r)
    )
    gains, raisings = [], []
    lost = [a["S0"][s] - a["L0"][s] for s in range(6)]
    growth = [r["L0"][s] - r["S0"][s] for s in range(6)]
    fall = [(r["Lp"][s] - r["L+"][s]) - (r["Sq"][s] - r["S+"][s]) for s in range(6)]
    for s in range(6):
        gains.append((a["L+"][s] - a["Lp"][s]) - (a["S+"][s] - a["Sq"][s]))
        raisings.append(gains[s] - (sum(fall) / 6) / (sum(growth) / 6) * lost[s] / 2)
    assert gain_of(scores, 0) == pytest.approx(gains)
    assert raising_of(scores, ranks, 0) == pytest.approx(raisings)
    rise = [r["S-"][s] - r["Sp"][s] for s in range(6)]
    costs = [a["Sp"][s] - a["S-"][s] for s in range(6)]
    assert cost_of(scores) == pytest.approx(costs)
    assert lowering_of(scores, ranks) == pytest.approx(
        [costs[s] - (sum(rise) / sum(growth)) * lost[s] / 2 for s in range(6)]
    )


# -- anything else ----------------------------------------------------------------------------------------------------


def test_a_loss_is_judged_as_well():
    """Scores are losses with their sign turned: no text then speaks of accuracy or points."""
    loss = MetricDescription(name="loss", unit="", higher_is_better=False)
    runs = [
        run._replace(
            score=-(0.5 + 0.1 * (run.arm == "lb") + 0.001 * run.seed * (run.arm == "lb")), train_score=-0.1, chance=-2.3
        )
        for run in two_batches(np.random.default_rng(0), 5)
    ]
    found = judge(runs, "sb", metric=loss)
    assert found.claims[0].outcome == "supported"
    text = " ".join([found.answer, *(claim.evidence for claim in found.claims)])
    assert "points" not in text
    assert "accuracy" not in text


def test_skewed_differences_are_named():
    runs = two_batches(np.random.default_rng(0), 10, lost=0.0)
    runs = changed(runs, "lb", range(3, 4), score=0.3)
    caveats = compare(runs, "sb").caveats
    assert any("lb are skewed" in caveat and "seed 3 lies far" in caveat for caveat in caveats)


def test_one_seed_concludes_nothing_and_says_so():
    found = compare(study(num_seeds=1), "sb")
    assert found.gaps["lb"].paired.student is None
    assert found.gaps["lb"].ci_half_width is None
    assert {claim.outcome for claim in found.claims} == {"undecided"}
    assert any("one pair of seeds" in caveat for caveat in found.caveats)


def test_what_is_lost_or_missing_is_said():
    runs = two_batches(np.random.default_rng(0), 3)
    runs = changed(runs, "lb", range(1, 2), status="diverged", score=None, measures={})
    found = compare(runs, "sb")
    assert found.gaps["lb"].unfinished_runs == "1 diverged"
    assert sorted(found.gaps["lb"].paired.differences) == [0, 2]
    assert "lb: 1 diverged" in " ".join(found.caveats)


def test_a_study_without_its_baseline_has_no_verdict():
    runs = study()
    without = compare([run for run in runs if run.arm != "sb"], "sb")
    assert (without.gaps, without.claims, without.answer) == ({}, [], "")
    assert "no finished run" in without.caveats[0]
    failed = compare([run._replace(status="failed") if run.arm == "sb" else run for run in runs], "sb")
    assert (failed.gaps, failed.claims) == ({}, [])


def test_arms_have_the_roles_that_their_settings_give_them():
    arms = group_by_arm(study() + with_remedies(0.0))
    found = roles(arms, "sb")
    assert [arm.name for arm in found.plain] == ["lb", "lb-long"]
    assert [arm.name for arm in found.longer] == ["lb-long"]
    assert [arm.name for arm in found.scaled] == ["lb-sqrt"]
    kinds = {each.arm.name: each.kind for each in found.interventions}
    assert kinds == {
        "sb-lower": "lower",
        "sb-placebo": "placebo",
        "lb-placebo": "placebo",
        **{f"{size}-{measure}": "raise" for size in ("sb", "lb") for measure in ("logdet", "spread")},
    }


def test_a_larger_batch_is_plain_with_the_groups_of_a_baseline_of_one_group_and_with_its_rule():
    """Batch norm over 32 samples at both batches; or over the batch at both; or over 64 at the large one."""
    norms = {"sb": (32, 32), "lb": (2048, 32), "lb-64": (2048, 64)}
    settings = {
        name: LARGE | {"batch.global_size": size, "model.norm": "ghost", "batch.ghost_size": ghost}
        for name, (size, ghost) in norms.items()
    }
    settings["lb-sync"] = settings["lb"] | {"model.norm": "sync", "batch.ghost_size": None}
    rng, end = np.random.default_rng(1), Ending(verdicts.ACCURACY)
    arms = group_by_arm(
        [simulated_run(rng, name, seed, each, end) for name, each in settings.items() for seed in (0, 1)]
    )
    assert [arm.name for arm in roles(arms, "sb").plain] == ["lb", "lb-sync"]


ADAM = LARGE | {"optim.name": "adamw", "optim.betas": [0.9, 0.999], "optim.weight_decay": 0.1, "optim.base_size": 32}
HALF_LIFE: dict[str, object] = {"optim.beta2_scaling": "half_life"}
DECAY: dict[str, object] = {"optim.weight_decay_scaling": "linear"}
RULES: dict[str, dict[str, object]] = {
    "lb": {},
    "lb-sqrt": {"optim.scaling": "sqrt"},
    "lb-half-life": HALF_LIFE,
    "lb-decay": DECAY,
    "lb-all": {"optim.scaling": "sqrt"} | HALF_LIFE | DECAY,
    "lb-by-hand": {"optim.lr": 0.16, "optim.betas": [0.9, 0.98]},
}


def ruled(arms: dict[str, dict[str, object]], size: int = 2048, **common: object) -> list[Run]:
    rng, end = np.random.default_rng(1), Ending(verdicts.ACCURACY)
    base = ADAM | {name.replace("__", "."): value for name, value in common.items()}
    settings = {"sb": base | {"batch.global_size": 32}}
    settings |= {name: base | {"batch.global_size": size} | changes for name, changes in arms.items()}
    return [simulated_run(rng, name, seed, each, end) for name, each in settings.items() for seed in range(3)]


@pytest.mark.parametrize(
    "common", [{}, {"optim__name": "muon", "optim__adamw_lr": 0.01}, {"algorithm__local_sgd": "swap"}]
)
def test_every_rule_of_the_rate_is_a_scaled_rate(common):
    """Judged by what betas, eps, rate and weight decay are at the batch, whoever gives them."""
    arms = group_by_arm(ruled(RULES, **common))
    found = roles(arms, "sb")
    assert [arm.name for arm in found.plain] == ["lb"]
    assert [arm.name for arm in found.scaled] == [*RULES][1:]
    counterpart = unscaled_counterpart(arms.values(), arms["sb"])
    assert {arm.name: getattr(counterpart(arm), "name", "") for arm in found.scaled} == dict.fromkeys(
        [*RULES][1:], "lb"
    )
    assert (found.longer, found.other_length) == ([], [])


def test_a_rule_is_compared_with_the_arm_that_is_nearest_to_the_baseline():
    lower = {"lb-low": {"optim.weight_decay": 0.0}, "lb-slow": {"optim.lr": 0.001}}
    adam = {"lb": {}, "lb-adam-sqrt": {"optim.scaling": "adam_sqrt"}}
    runs = ruled(lower | adam, size=128)
    arms = group_by_arm(runs)
    found = roles(arms, "sb")
    assert [arm.name for arm in found.plain] == ["lb"]
    assert [arm.name for arm in found.scaled] == ["lb-adam-sqrt"]
    other = unscaled_counterpart(arms.values(), arms["sb"])(arms["lb-adam-sqrt"])
    assert other is not None
    assert other.name == "lb"
    assert of(runs, "scaling").claim == "Scaling the learning rate, betas and eps does not resolve the gap."
    assert of(ruled({"lb": {}, "lb-half": HALF_LIFE}), "scaling").claim.startswith("Scaling the betas does")
    mixed = {"lb": {}, "lb-traded": {"optim.lr": 0.04, "optim.weight_decay": 0.05}}
    assert roles(group_by_arm(ruled(mixed)), "sb").scaled == []  # one more, one less: no rule does that


def test_matched_by_epochs_or_updates():
    found = compare(with_remedies(0.0), "sb").gaps
    assert found["lb-long"].matched == "updates"


def test_a_look_of_five_percent_is_students_test():
    values = np.random.default_rng(0).normal(0.3, 1, 7)
    assert Look().p(values) == pytest.approx(p_value(values))


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
