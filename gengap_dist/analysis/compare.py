"""Compares the runs of a study with its baseline: gaps, correlations, claims and caveats."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gengap_dist.analysis.arm_roles import Arm, group_by_arm, nearly_equal
from gengap_dist.analysis.claims import judge
from gengap_dist.analysis.correlations import correlations
from gengap_dist.analysis.critical_batch import updates_to_target
from gengap_dist.analysis.results import Comparison, Gap, Run, TrainingSummary
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.rules.matching import MEASURE_ALL, number_range
from gengap_dist.analysis.rules.training import Training
from gengap_dist.runs.metric import ACCURACY, MetricDescription
from gengap_dist.statistics.paired import holm, minimum_detectable_effect, p_value, paired
from gengap_dist.statistics.skew import outlying, sign_flip_p, skewness

SKEWED, PAIRS_FOR_SKEW = 1.0, 6
FAR = 5.0  # median absolute deviations


def compare(
    runs: Sequence[Run],
    baseline: str,
    metric: MetricDescription = ACCURACY,
    margin: float | None = None,
    look: Look | None = None,
) -> Comparison:
    """The comparison of all arms with the baseline; what cannot be computed is left out and named in the caveats.

    Args:
        runs: all runs, also those that did not finish; arms are listed in the order of their first runs.
        baseline: name of the arm that the others are compared with.
        metric: what the scores of the runs are.
        margin: see `claims.judge`, as `look`.
        look: how sure differences must be.
    """
    arms = group_by_arm(runs)
    gaps = _gaps(runs, arms, baseline)
    judged = judge(runs, baseline, metric, margin, look)
    trained = {name: each.trained for name, each in judged.training.items()} or None
    caveats = [look.sentence] if look and look.sentence else []
    return Comparison(
        metric=metric,
        baseline=baseline,
        answer=judged.answer,
        training={name: _summary(each) for name, each in judged.training.items()},
        gaps=gaps,
        correlations=correlations(runs, trained),
        target=updates_to_target(runs, baseline),
        claims=judged.claims,
        caveats=[*caveats, *_caveats(runs, arms, baseline, gaps, metric), *_skew_caveats(gaps, metric)],
        interventions=judged.interventions,
        margin=judged.margin,
    )


def _summary(training: Training) -> TrainingSummary:
    ratios = [*training.log_loss_ratio.values()]
    return TrainingSummary(str(training), float(np.exp(np.mean(ratios))) if ratios else None)


def _skew_caveats(gaps: dict[str, Gap], metric: MetricDescription) -> list[str]:
    """One sentence for each arm whose differences are too skewed for a t test, or have a value far from the others."""
    out = []
    for name, gap in gaps.items():
        seeds, values = [*gap.paired.differences], np.array([*gap.paired.differences.values()])
        skew = skewness(values) if len(values) >= PAIRS_FOR_SKEW else None
        far = outlying(values, FAR) if len(values) >= PAIRS_FOR_SKEW and np.ptp(values) else []
        if far or (skew is not None and abs(skew) > SKEWED):
            of_seed = f", seed {', '.join(str(seeds[at]) for at in far)} lies far from the others" if far else ""
            median, p = metric.format_difference(float(np.median(values))), sign_flip_p(values)
            out.append(
                f"The differences of {name} are skewed (skewness {skew or 0.0:+.1f}{of_seed}), for which t intervals "
                f"are too narrow: their median is {median}, and an exact sign-flip test gives p = {p:.2g}."
            )
    return out


def _gaps(runs: Sequence[Run], arms: dict[str, Arm], baseline: str) -> dict[str, Gap]:
    base = arms[baseline].scores() if baseline in arms else {}
    unfinished = _unfinished_runs(runs)
    out: dict[str, Gap] = {}
    for name, arm in arms.items():
        if name == baseline or not (base.keys() & arm.scores().keys()):
            continue
        difference = paired(base, arm.scores())
        values = np.array([*difference.differences.values()])
        n = len(values)
        out[name] = Gap(
            paired=difference,
            p=p_value(values),
            holm=None,
            ci_half_width=(difference.student[1] - difference.student[0]) / 2 if difference.student else None,
            minimum_detectable_effect=minimum_detectable_effect(float(values.std(ddof=1)), n)
            if difference.student
            else None,
            matched=_matched(arm, arms[baseline]),
            unfinished_runs=unfinished.get(name, ""),
        )
    corrected = holm([gap.p for gap in out.values()])
    return {name: gap._replace(holm=p) for (name, gap), p in zip(out.items(), corrected, strict=True)}


def _matched(arm: Arm, base: Arm) -> str:
    words = []
    for unit, count in (("epochs", lambda run: run.num_epochs), ("updates", lambda run: run.num_updates)):
        of_arm, of_baseline = (float(np.mean([count(run) for run in each.runs.values()])) for each in (arm, base))
        if nearly_equal(of_arm, of_baseline):
            words.append(unit)
    return " and ".join(words)


def _unfinished_runs(runs: Sequence[Run]) -> dict[str, str]:
    """Runs that did not finish, by arm, as text ("1 diverged"); arms without one are missing."""
    counts: dict[str, Counter[str]] = {}
    for run in runs:
        if run.status != "finished":
            counts.setdefault(run.arm, Counter())[run.status] += 1
    return {arm: ", ".join(f"{number} {status}" for status, number in found.items()) for arm, found in counts.items()}


def largest_difference(scores: Sequence[float]) -> float:
    """The largest loss or gain that there can be: a share is between 0 and 1.

    >>> largest_difference([0.7, 0.9])
    0.8
    """
    mean = float(np.mean(scores))
    return max(mean, 1 - mean)


def _smallest_differences(
    num_pairs: int, widths: Sequence[float], effects: Sequence[float], reach: float, metric: MetricDescription
) -> str:
    """Which differences such a study finds, by the spread of its results; that none can be found, if so.

    Args:
        num_pairs: seeds.
        widths: half the interval of each arm.
        effects: what is found in each arm with 80% power.
        reach: the largest possible difference.
        metric: of the scores.
    """
    width, effect = (float(np.median(values)) for values in (widths, effects))
    unit = "points" if metric.unit == "share" else metric.unit
    if width >= reach:
        return (
            f"With {num_pairs} seeds no difference {'' if min(widths) >= reach else 'of most arms '}can be significant."
        )
    least = f"{metric.format_difference(width, signed=False)} {unit}".rstrip()
    found = f"a true difference of {metric.format_difference(effect, signed=False)} {unit}".rstrip()
    missed = f"{found} is missed one time in five"
    if effect >= reach:
        missed = "any true difference is missed more often than one time in five"
    return (
        f"With {num_pairs} seeds a loss or gain under {least} (95% intervals on these test samples, median over arms) "
        f"is not significant, and {missed}."
    )


def _caveats(
    runs: Sequence[Run], arms: dict[str, Arm], baseline: str, gaps: dict[str, Gap], metric: MetricDescription
) -> list[str]:
    out = []
    if baseline not in arms or not arms[baseline].runs:
        out.append(f"The baseline ({baseline}) has no finished run: the other arms have no comparison.")
    unfinished = _unfinished_runs(runs)
    if ended := [f"{name}: {unfinished[name]}" for name in arms if name in unfinished]:
        out.append(
            "Runs without a result are counted but left out of the means, so the means may be better than the "
            f"arm is: {'; '.join(ended)}."
        )
    num_pairs = [len(gap.paired.differences) for gap in gaps.values()]
    if num_pairs and max(num_pairs) == 1:
        out.append("With one pair of seeds there is no interval, and no difference can be significant.")
    elif widths := [gap.ci_half_width for gap in gaps.values() if gap.ci_half_width is not None]:
        effects = [gap.minimum_detectable_effect for gap in gaps.values() if gap.minimum_detectable_effect is not None]
        reach = largest_difference([*arms[baseline].scores().values()]) if metric.unit == "share" else math.inf
        out.append(_smallest_differences(max(num_pairs), widths, effects, reach, metric))
    counts = [run.num_skipped for run in runs]
    if skipped := [count for count in counts if count]:
        out.append(
            f"probe.max_time_fraction left out {number_range(skipped)} in {len(skipped)} of {len(counts)} runs, which "
            f"a comparison by training curves may need: {MEASURE_ALL}."
        )
    seeds = max((len(arm.runs) for arm in arms.values()), default=0)
    short = [f"{name} ({n})" for name, gap in gaps.items() if (n := len(gap.paired.differences)) < seeds]
    if short:
        out.append(f"Fewer than {seeds} pairs: {', '.join(short)}.")
    if any(gap.p is None and len(gap.paired.differences) > 1 for gap in gaps.values()):
        out.append("Where all pairs have exactly the same difference, there is no interval.")
    if len({run.num_probe_samples for arm in arms.values() for run in arm.runs.values() if run.measures}) > 1:
        out.append(
            "Probe sets differ in size between runs: near-rank loss is compared only between probe sets of equal size."
        )
    without_score = [name for name, arm in arms.items() if arm.runs and len(arm.scores()) < len(arm.runs)]
    if without_score:
        out.append(f"Some finished runs have no test {metric.name}: {', '.join(without_score)}.")
    measured = {name for arm in arms.values() for run in arm.runs.values() for name in run.measures}
    partly = [name for name, arm in arms.items() if any(measured - run.measures.keys() for run in arm.runs.values())]
    if measured and partly:
        out.append(f"Some explanations were not measured in every run: {', '.join(partly)}.")
    near_rank_losses = [run.near_rank_loss for arm in arms.values() for run in arm.runs.values()]
    if near_rank_losses and all(loss == 0 for loss in near_rank_losses):
        out.append(
            "Near-rank loss of the last hidden layer is 0 in every trained network: no singular value of its centred "
            "activations is below 0.01 of the largest, so this measure counts nothing here. Effective rank has no "
            "threshold."
        )
    unpaired = [name for name in arms if name != baseline and name not in gaps]
    if unpaired and baseline in arms and arms[baseline].runs:
        out.append(f"No seed has both the baseline and: {', '.join(unpaired)}.")
    return out
