"""Rules 2 and 6: do networks trained with larger batches generalize worse, and is their near-rank loss higher?

Both claims compare arms that are equal in training (`matching`). Test accuracy is judged for new test images, where
every image's correctness is known; other scores, and near-rank loss, are judged over seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.results import Claim, Outcome, Run
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN, JudgedStudy, Outcomes, completions, described, share
from gengap_dist.analysis.rules.look import Look, array_of, two_sided_p
from gengap_dist.analysis.rules.matching import QUARTER, Match, match
from gengap_dist.statistics.paired import POWER, Interval, are_equal, critical_t, differences, holm
from gengap_dist.statistics.two_way import TwoWay, two_way

Finding = Literal[
    "above the margin",
    "there, but below the margin",
    "below the margin",
    "undecided",
    "cannot be matched",
    "did not train",
]
NO_LOSS: tuple[Finding, ...] = ("below the margin", "there, but below the margin")


class Difference(NamedTuple):
    """What an arm has more of than the baseline at equal training, and how it is judged."""

    arm: Arm
    values: Outcomes
    interval: Interval | None
    """The one that decides."""
    p: float
    """Two-sided, of a mean at the margin."""
    finding: Finding
    match: Match
    where: str = ""
    """What the interval is for: new images, these images, validation samples."""
    reason: str = ""
    """How it was matched, or why there is no finding."""


class _Rule(NamedTuple):
    """How the differences of two groups of runs are judged."""

    judge: Callable[[Mapping[int, object]], tuple[Interval | None, float]]
    """Of seed to difference: interval of the mean, and p of its being at the margin."""
    margin: float
    bounds: tuple[object, object] | None
    """Lowest and highest value that a missing run may have."""
    where: str
    ties_decide: bool = False
    """Whether differences that are all the same decide."""


def judge_gap(study: JudgedStudy) -> tuple[Claim, list[Difference]]:
    """Claim 1: networks trained with large batches generalize worse than with small ones."""
    margin = f"{study.show(study.margin, signed=False)}{study.unit}"
    claim = (
        f"Networks trained with large batches generalize worse than with small ones, by more than {margin} at equal "
        "training."
    )
    control = (
        "The same seeds and initial weights, trained to the same loss: either both to the end, or compared where their "
        "curves have the same training loss at a low or constant learning rate."
    )
    control_problem = cache(partial(_control_problem, study, _scores))
    judged = [_gap_of(study, arm, control_problem) for arm in study.roles.plain]
    found, outcome, finding = _combined(judged, study.look)
    evidence = " ".join(_gap_text(study, each) for each in found) if found else _nothing(study)
    return Claim("gap", claim, outcome, evidence, control, finding), found


def judge_growth(study: JudgedStudy) -> tuple[Claim, list[Difference]]:
    """Claim 2: a larger batch increases near-rank loss of the units' activations."""
    claim = (
        f"A larger batch increases near-rank loss of the units' activations, by more than {NEAR_RANK_MARGIN} at equal "
        "training."
    )
    control = (
        "Centred activations of the last hidden layer on the same fixed set of samples, matched in training as above. "
        "On a run's own batch, near-rank loss changes with the batch size even in an untrained network."
    )
    control_problem = cache(partial(_control_problem, study, _near_rank_losses))
    judged = [_growth_of(study, arm, control_problem) for arm in study.roles.plain]
    found, outcome, finding = _combined(judged, study.look)
    evidence = " ".join(_growth_text(study, each) for each in found) if found else _nothing(study)
    return Claim("near_rank_loss_grows", claim, outcome, evidence + _own_batch_text(study), control, finding), found


# -- one arm ----------------------------------------------------------------------------------------------------------


def _scores(matched: Match) -> tuple[Outcomes, Outcomes]:
    return matched.base_scores, matched.scores


def _near_rank_losses(matched: Match) -> tuple[Outcomes, Outcomes]:
    return matched.near_rank_losses, matched.base_near_rank_losses


def _gap_of(study: JudgedStudy, arm: Arm, control_problem: Callable[[], str]) -> Difference:
    matched = _checked_match(study, arm, lambda each: each.score_error, study.margin, control_problem)
    groups = _scores(matched)
    if not matched.how or not differences(*groups):
        return _unmatched(study, arm, matched)
    if matched.how == "finished" and (correct := _correctness(study, arm)):
        samples = len(next(iter(correct[0].values())))

        def judge_images(values: Mapping[int, object]) -> tuple[Interval | None, float]:
            images = two_way(np.stack([np.asarray(values[seed]) for seed in sorted(values)]))
            return new_images(images, study.look, len(values), samples, study.margin)

        nothing, everything = np.zeros(samples, dtype=np.int8), np.ones(samples, dtype=np.int8)
        rule = _Rule(judge_images, study.margin, (nothing, everything), "on new images", ties_decide=True)
        return _judged(study, arm, matched, correct, rule)
    where = "on these test samples" if matched.how == "finished" else "on these validation samples"
    return _judged(study, arm, matched, groups, _over_seeds(study, study.margin, study.bounds, where))


def _growth_of(study: JudgedStudy, arm: Arm, control_problem: Callable[[], str]) -> Difference:
    if not study.growth(arm, study.base) and study.trained(arm).runs:
        reason = "near-rank loss of both was not measured on probe sets of one size"
        return _unmatched(study, arm, Match("", reason))
    matched = _checked_match(study, arm, lambda each: each.near_rank_error, NEAR_RANK_MARGIN, control_problem)
    groups = _near_rank_losses(matched)
    if not matched.how or not differences(*groups):
        if matched.how:
            matched = matched._replace(how="", reason="near-rank loss was not measured along both curves")
        return _unmatched(study, arm, matched)
    rule = _over_seeds(study, NEAR_RANK_MARGIN, (0.0, 1.0), "")._replace(ties_decide=True)
    return _judged(study, arm, matched, groups, rule)


def _over_seeds(study: JudgedStudy, margin: float, bounds: tuple[float, float] | None, where: str) -> _Rule:
    def judge(values: Mapping[int, object]) -> tuple[Interval | None, float]:
        array = np.array([values[seed] for seed in sorted(values)], dtype=float)
        return study.look.interval(array), study.look.p(array, margin)

    return _Rule(judge, margin, bounds, where)


def _checked_match(
    study: JudgedStudy,
    arm: Arm,
    error: Callable[[Match], float],
    margin: float,
    control_problem: Callable[[], str],
) -> Match:
    """A match; by the curve only with little noise, and with a negative control that shows no difference."""
    if not (study.trained(arm).runs.keys() & study.trained(study.base).runs.keys()):
        return Match("", "no seed has a run of both that trained")
    matched = match(study, arm, study.base)
    if matched.how != "curve":
        return matched
    if error(matched) > QUARTER * margin:
        return matched._replace(how="", reason="the noise of the loss is worth more than a quarter of the margin")
    problem = control_problem()
    return matched._replace(how="", reason=problem) if problem else matched


def _control_problem(study: JudgedStudy, groups: Callable[[Match], tuple[Outcomes, Outcomes]]) -> str:
    """Why the negative controls allow no match by the curve; empty if they do. It is the same for every arm."""
    if not study.roles.other_length:
        return (
            "matched by the curve, it needs a negative control, an arm of the baseline's batch with another number of "
            "updates"
        )
    for control in study.roles.other_length:
        found = match(study, control, study.base, only_curve=True)
        values = differences(*groups(found)) if found.how else {}
        interval = study.look.interval(array_of(values))
        if interval is None or study.missing((control, study.base), groups(found)):
            reason = "not all of its runs trained" if found.how else found.reason
            return f"its negative control {control.name} cannot be matched ({reason})"
        if not interval[0] <= 0 <= interval[1]:
            return f"its negative control {control.name}, of the baseline's batch, shows a difference, too"
    return ""


def _unmatched(study: JudgedStudy, arm: Arm, matched: Match) -> Difference:
    training = study.training[arm.name]
    if training.seeds and training.num_failed == len(training.seeds):
        return Difference(
            arm, {}, None, 1.0, "did not train", matched, reason=f"{training.num_failed} of {len(training.seeds)} runs"
        )
    return Difference(arm, {}, None, 1.0, "cannot be matched", matched, reason=matched.reason)


def _judged(
    study: JudgedStudy,
    arm: Arm,
    matched: Match,
    groups: tuple[Mapping[int, object], Mapping[int, object]],
    rule: _Rule,
) -> Difference:
    """The finding for the differences of two groups; with runs missing, one that holds whatever they had found."""
    values = _minus(*groups)
    means = _means(values)
    interval, p = rule.judge(values)
    out = Difference(
        arm, means, interval, p, _finding(means, interval, rule), matched, rule.where, reason=matched.reason
    )
    missing = study.missing((arm, study.base), groups)
    if not missing:
        return out
    findings, highest = set(), 0.0
    for each in completions(groups, missing, rule.bounds):
        completed = _minus(*each)
        of_it, p = rule.judge(completed)
        findings.add(_finding(_means(completed), of_it, rule))
        highest = max(highest, p)
    if findings == {out.finding}:
        return out._replace(p=highest)
    num = len(missing)
    return out._replace(finding="undecided", reason=f"{num} of {num + len(values)} pairs are missing")


def _minus(first: Mapping[int, object], second: Mapping[int, object]) -> dict[int, object]:
    """Seed to first minus second, numbers or arrays."""
    common = sorted(first.keys() & second.keys())
    return {seed: np.subtract(np.asarray(first[seed]), np.asarray(second[seed])) for seed in common}


def _means(values: Mapping[int, object]) -> dict[int, float]:
    return {seed: float(np.mean(np.asarray(value, dtype=float))) for seed, value in values.items()}


def _finding(values: Outcomes, interval: Interval | None, rule: _Rule) -> Finding:
    tied = len(values) > 1 and are_equal(array_of(values))
    if interval is None or (tied and not rule.ties_decide):
        return "undecided"  # one pair, or pairs that differ by exactly the same
    if interval[0] > rule.margin:
        return "above the margin"
    if interval[1] < rule.margin:
        return "there, but below the margin" if interval[0] > 0 else "below the margin"
    return "undecided"


def _correctness(study: JudgedStudy, arm: Arm) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]] | None:
    """Seed to the correctness of each test image, of the baseline and of an arm; None if a run has none."""
    groups = []
    for each in (study.base, arm):
        runs = study.trained(each).runs
        groups.append({seed: run.test_correct for seed, run in runs.items() if run.score is not None})
    every = [correct for group in groups for correct in group.values()]
    sizes = {-1 if correct is None else len(correct) for correct in every}
    if len(sizes) != 1 or min(sizes) < 2 or len(groups[0].keys() & groups[1].keys()) < 2:
        return None
    first, second = ({seed: np.asarray(correct, dtype=np.int8) for seed, correct in group.items()} for group in groups)
    return first, second


def new_images(
    images: TwoWay, look: Look, num_seeds: int, num_images: int, margin: float
) -> tuple[Interval | None, float]:
    """Interval for new seeds and new test images, and p of a mean at the margin.

    At a single look with the degrees of freedom of the two-way variance. At one of several looks with the critical
    value that the interval of the seeds has there. Where no image differs, the share of images that do is at most
    1 - (level / 2)^(1 / M) with that confidence, and so is the mean.
    """
    if math.isinf(look.critical(num_seeds)):
        return (-math.inf, math.inf), 1.0
    deviation = images.variance**0.5
    if not deviation:
        half_width = 1 - (look.level / 2) ** (1 / num_images)
        p = min(1.0, 2 * (1 - min(1.0, abs(images.mean - margin))) ** num_images)
        return (images.mean - half_width, images.mean + half_width), p
    t = (images.mean - margin) / deviation
    if not look.sentence:
        return images.interval_at(critical_t(look.level, images.df)), two_sided_p(t, images.df)
    return images.interval_at(look.critical(num_seeds)), look.p_of_t(t, num_seeds)


# -- all arms ---------------------------------------------------------------------------------------------------------


def _combined(found: Sequence[Difference], look: Look) -> tuple[list[Difference], Outcome, str]:
    """Supported if one arm survives Holm's correction, contradicted if every arm is below the margin.

    Returns:
        The arms, of which those that do not survive the correction are undecided; outcome; finding.
    """
    compared = [at for at, each in enumerate(found) if each.finding not in ("cannot be matched", "did not train")]
    corrected = dict(zip(compared, holm([found[at].p for at in compared]), strict=True))
    out = []
    for at, each in enumerate(found):
        p = corrected.get(at)
        if each.finding == "above the margin" and (p is None or p >= look.level):
            reason = f"it does not survive the correction for {len(compared)} arms"
            out.append(each._replace(finding="undecided", reason=reason))
        else:
            out.append(each)
    findings = {each.finding for each in out}
    if "above the margin" in findings:
        return out, "supported", "above the margin"
    if findings == {"below the margin"}:
        return out, "contradicted", "below the margin"
    if findings and findings <= set(NO_LOSS):
        return out, "contradicted", "there, but below the margin"
    if findings and findings <= {"cannot be matched", "did not train"}:
        return out, "undecided", "cannot be matched" if "cannot be matched" in findings else "did not train"
    return out, "undecided", ""


# -- text -------------------------------------------------------------------------------------------------------------


def _nothing(study: JudgedStudy) -> str:
    return f"No arm differs from {study.base.name} only in a larger batch, and perhaps in its length."


def _gap_text(study: JudgedStudy, found: Difference) -> str:
    arm, lost = found.arm, study.lost(found.arm, study.base)
    ends = ""
    if lost:
        mean = fmean(lost.values())
        shown = study.described(lost, turned=mean < 0)
        ends = f" At the end it {study.loses(mean)} {shown}{study.unit} on test samples"
        ends += _parts(study, arm, lost) + "."
    if not found.values:
        return f"{arm.name}: {found.finding} ({found.reason}).{ends}"
    mean = fmean(found.values.values())
    text = study.described(found.values, found.interval, turned=mean < 0)
    words = f"{arm.name} {study.loses(mean)} {text}{study.unit} at equal training, {found.where}: {found.finding}"
    if found.finding == "undecided" and (least := detectable(study, found)):
        words += f"; {study.show(least, signed=False)}{study.unit} would be found four times in five"
    return f"{words} ({found.reason}).{ends}"


def detectable(study: JudgedStudy, found: Difference) -> float | None:
    """The true difference that is found to be above the margin with 80% power, for the width of the interval.

    margin + h (1 + z / c), with the half width h of the interval, the critical value c of the look, and z = 0.84.
    """
    critical = study.look.critical(len(found.values)) if len(found.values) > 1 else math.inf
    if found.interval is None or math.isinf(critical) or found.interval[0] == found.interval[1]:
        return None
    from scipy import special  # slow to import, see statistics/paired.py

    half_width = (found.interval[1] - found.interval[0]) / 2
    return study.margin + half_width * (1 + float(special.ndtri(POWER)) / critical)


def _parts(study: JudgedStudy, arm: Arm, lost: Outcomes) -> str:
    """Test loss as the sum of what is lost in training, and of the growth of the train-test gap; and the power."""
    training = study.training[arm.name]
    in_training = {seed: -training.difference[seed] for seed in lost if seed in training.difference}
    if not in_training:
        return ""
    gap = differences(lost, in_training)
    text = f", {study.described(in_training)} on training samples plus {study.described(gap)} of train-test gap"
    if training.label in ("as well", "unclear"):
        told = "it trained as well" if training.label == "as well" else "whether it trained as well is unclear"
        text += f"; {told} (power of that test {training.power:.0%})"
    return text


def _growth_text(study: JudgedStudy, found: Difference) -> str:
    arm, base = found.arm, study.base
    since = [_since_untrained(study, each) for each in (base, arm)]
    changes = f" Since their own untrained networks: {base.name} {since[0]}, {arm.name} {since[1]}."
    changes += _other_measures(study, arm)
    if not found.values:
        ends = share(study.growth(arm, base), study.look) if study.growth(arm, base) else "not known"
        return f"{arm.name}: {found.finding} ({found.reason}); at the end {ends}.{changes}"
    text = described(found.values, "{:+.3f}".format, found.interval)
    reason = f" ({found.reason})" if found.finding == "undecided" else ""
    return f"{arm.name} {text} at equal training: {found.finding}{reason}.{changes}"


def _other_measures(study: JudgedStudy, arm: Arm) -> str:
    """What two other measures say at the end, which decide nothing."""

    def values(each: Arm, measure: Callable[[Run], float | None]) -> dict[int, float]:
        measured = {seed: measure(run) for seed, run in study.trained(each).runs.items()}
        return {seed: value for seed, value in measured.items() if value is not None}

    measures: dict[str, Callable[[Run], float | None]] = {
        "raw": lambda run: run.near_rank_loss_raw,
        "all layers pooled": lambda run: run.near_rank_loss_pooled,
    }
    shown = [
        f"{name} {share(grown, study.look)}"
        for name, measure in measures.items()
        if (all_seeds := study.growth(arm, study.base))
        and (grown := differences(values(arm, measure), values(study.base, measure))).keys() >= all_seeds.keys()
    ]
    return f" Beside it, at the end: {', '.join(shown)}." if shown else ""


def _since_untrained(study: JudgedStudy, arm: Arm) -> str:
    runs = study.trained(arm).runs.values()
    changes = [
        run.near_rank_loss - run.near_rank_loss_untrained
        for run in runs
        if run.near_rank_loss is not None and run.near_rank_loss_untrained is not None
    ]
    if not changes:
        return "not known"
    of = "" if len(runs) == len(arm.runs) else f" (of the {len(runs)} run{'s' * (len(runs) > 1)} that trained)"
    return f"{fmean(changes):+.3f}{of}"


def _own_batch_text(study: JudgedStudy) -> str:
    """The paper's own matrix: change since the untrained network on the run's own batch, minus that of the baseline."""
    changes = {}
    for arm in (study.base, *study.roles.plain):
        found = {}
        for seed, run in study.trained(arm).runs.items():
            shared = [name for name in run.own_batch if name in run.own_batch_untrained and "near_rank_loss/" in name]
            values = [run.own_batch[name] - run.own_batch_untrained[name] for name in shared if "/rel_1e-2" in name]
            if values and math.isfinite(fmean(values)):
                found[seed] = fmean(values)
        changes[arm.name] = found
    shown = [
        f"{arm.name} {share(grown, study.look)}"
        for arm in study.roles.plain
        if (grown := differences(changes[arm.name], changes[study.base.name]))
    ]
    if not shown:
        return ""
    return (
        " On each run's own batch, the change since the untrained network minus that of the baseline, which decides "
        f"nothing: {', '.join(shown)}."
    )
