"""Rules 2 and 6: do networks trained with larger batches generalize worse, and is their near-rank loss higher?

Both claims compare arms that are equal in training (`matching`). Test accuracy is judged for new test images, where
every image's correctness is known; other scores, and near-rank loss, are judged over seeds.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.results import Claim, Outcome
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN, JudgedStudy, Outcomes, completions, described, share
from gengap_dist.analysis.rules.look import Look, are_equal, array_of, critical_t, two_sided_p
from gengap_dist.analysis.rules.matching import Match, match
from gengap_dist.statistics.paired import Interval, differences, holm, minimum_detectable_effect
from gengap_dist.statistics.sequential import e_p_value, e_value
from gengap_dist.statistics.two_way import TwoWay, two_way

Finding = Literal[
    "above the margin",
    "there, but below the margin",
    "below the margin",
    "undecided",
    "cannot be matched",
    "did not train",
]
COMPARED: tuple[Finding, ...] = ("above the margin", "there, but below the margin", "below the margin", "undecided")


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
    on_new_images: bool = False
    reason: str = ""
    """Why there is no finding."""


Judge = Callable[[Sequence[float] | np.ndarray], tuple[Interval | None, float]]
"""Interval of the mean of differences, and p of its being at the margin."""


def judge_gap(study: JudgedStudy) -> tuple[Claim, list[Difference]]:
    """Claim 1: networks trained with large batches generalize worse than with small ones."""
    claim = "Networks trained with large batches generalize worse than with small ones, at equal training."
    control = (
        "The same seeds and initial weights, trained to the same loss: either both to the end, or compared where their "
        "curves have the same training loss at a low or constant learning rate."
    )
    found = [_gap_of(study, arm) for arm in study.roles.plain]
    outcome, finding = _combined(found, study.look)
    margin = f"The margin is {study.show(study.margin, signed=False)}{study.unit}."
    evidence = " ".join([*(_gap_text(study, each) for each in found), margin]) if found else _nothing(study)
    return Claim("gap", claim, outcome, evidence, control, finding), found


def judge_growth(study: JudgedStudy) -> tuple[Claim, list[Difference]]:
    """Claim 2: a larger batch increases near-rank loss of the units' activations."""
    claim = "A larger batch increases near-rank loss of the units' activations, at equal training."
    control = (
        "Centred activations of the last hidden layer on the same fixed set of samples, matched in training as above. "
        "On a run's own batch, near-rank loss changes with the batch size even in an untrained network."
    )
    found = [_growth_of(study, arm) for arm in study.roles.plain]
    found = [each for each in found if each]
    outcome, finding = _combined(found, study.look)
    if not found:
        reason = _nothing(study)
        if study.roles.plain:
            reason = "Near-rank loss was measured on no probe set that an arm shares with the baseline."
        return Claim("near_rank_loss_grows", claim, "undecided", reason, control), []
    evidence = " ".join([*(_growth_text(study, each) for each in found), f"The margin is {NEAR_RANK_MARGIN}."])
    return Claim("near_rank_loss_grows", claim, outcome, evidence + _own_batch_text(study), control, finding), found


# -- one arm ----------------------------------------------------------------------------------------------------------


def _gap_of(study: JudgedStudy, arm: Arm) -> Difference:
    matched, reason = _checked_match(study, arm, study.margin, lambda each: (each.base_scores, each.scores))
    values = differences(matched.base_scores, matched.scores)
    if not matched.how or not values:
        return _unmatched(study, arm, matched, reason)
    images = _over_images(study, arm, sorted(values)) if matched.how == "finished" else None
    images = images and images if not study.missing(arm, study.base) else None

    def judge(array: Sequence[float] | np.ndarray) -> tuple[Interval | None, float]:
        if images is None:
            return study.look.interval(array), study.look.p(array, study.margin)
        return new_images(images, study.look, len(array), study.margin)

    bounds = (0.0, 1.0) if study.metric.unit == "share" else None
    found = _judged(
        study, arm, matched, (matched.base_scores, matched.scores), (judge, study.margin, bounds), images is not None
    )
    return found if found.reason else found._replace(reason=reason)


def _growth_of(study: JudgedStudy, arm: Arm) -> Difference | None:
    if not study.growth(arm, study.base):
        return None
    matched, reason = _checked_match(
        study, arm, NEAR_RANK_MARGIN, lambda each: (each.near_rank_losses, each.base_near_rank_losses)
    )
    if not matched.how or not (matched.near_rank_losses.keys() & matched.base_near_rank_losses.keys()):
        return _unmatched(study, arm, matched, reason)

    def judge(array: Sequence[float] | np.ndarray) -> tuple[Interval | None, float]:
        return study.look.interval(array), study.look.p(array, NEAR_RANK_MARGIN)

    groups = matched.near_rank_losses, matched.base_near_rank_losses
    return _judged(study, arm, matched, groups, (judge, NEAR_RANK_MARGIN, (0.0, 1.0)), False)


def _checked_match(
    study: JudgedStudy, arm: Arm, margin: float, groups: Callable[[Match], tuple[Outcomes, Outcomes]]
) -> tuple[Match, str]:
    """A match, or why it does not count: by the curve it needs a negative control that shows no difference."""
    if not (study.trained(arm).runs.keys() & study.trained(study.base).runs.keys()):
        return Match("", ""), "no seed has a run of both that trained"
    matched = match(study, arm, study.base)
    if matched.how != "curve":
        return matched, matched.reason
    if not study.roles.other_length:
        return matched._replace(how=""), (
            "matched by the curve, it needs a negative control, an arm of the baseline's batch with another number of "
            "updates"
        )
    for control in study.roles.other_length:
        found = match(study, control, study.base, only_curve=True)
        values = array_of(differences(*groups(found))) if found.how else np.array([])
        interval = study.look.interval(values)
        if interval is None:
            return matched._replace(how=""), f"its negative control {control.name} cannot be matched ({found.reason})"
        if not interval[0] <= 0 <= interval[1]:
            return matched._replace(how=""), (
                f"its negative control {control.name}, of the baseline's batch, shows a difference, too"
            )
    return matched, matched.reason


def _unmatched(study: JudgedStudy, arm: Arm, matched: Match, reason: str) -> Difference:
    training = study.training[arm.name]
    if training.seeds and training.num_failed == len(training.seeds):
        return Difference(arm, {}, None, 1.0, "did not train", matched, reason=str(training))
    return Difference(arm, {}, None, 1.0, "cannot be matched", matched, reason=reason)


def _judged(
    study: JudgedStudy,
    arm: Arm,
    matched: Match,
    groups: tuple[Outcomes, Outcomes],
    rule: tuple[Judge, float, tuple[float, float] | None],
    on_new_images: bool,
) -> Difference:
    """The finding for the differences of two groups; with runs missing, one that holds whatever they had found."""
    judge, margin, bounds = rule
    values = differences(*groups)
    interval, p = judge(array_of(values))
    out = Difference(arm, values, interval, p, _finding(values, interval, margin), matched, on_new_images)
    missing = study.missing(arm, study.base)
    if not missing:
        return out
    filled = completions(groups, missing, bounds)
    possible = [differences(*each) for each in filled] if filled else []
    judged = [(each, *judge(array_of(each))) for each in possible]
    findings = {_finding(each, of_it, margin) for each, of_it, _ in judged}
    if findings == {out.finding}:
        return out._replace(p=max(p for _, _, p in judged))
    return out._replace(finding="undecided", reason=f"{len(missing)} of {len(missing) + len(values)} pairs are missing")


def _finding(values: Outcomes, interval: Interval | None, margin: float) -> Finding:
    if interval is None or (len(values) > 1 and interval[0] == interval[1] != 0):
        return "undecided"  # one pair, or pairs that differ by exactly the same
    if interval[0] > margin:
        return "above the margin"
    if interval[1] < margin:
        return "there, but below the margin" if interval[0] > 0 else "below the margin"
    return "undecided"


def _over_images(study: JudgedStudy, arm: Arm, seeds: Sequence[int]) -> TwoWay | None:
    """The differences of correctness over seeds and test images; None if some run has none."""
    pairs = [(study.base.runs[seed].test_correct, arm.runs[seed].test_correct) for seed in seeds]
    first, second = ([pair[at] for pair in pairs] for at in (0, 1))
    if len(pairs) < 2 or any(each is None or len(each) != len(pairs[0][0]) for each in [*first, *second]):  # type: ignore[arg-type]
        return None
    return two_way(np.subtract(np.stack(first), np.stack(second), dtype=np.int8))  # type: ignore[arg-type]


def new_images(images: TwoWay, look: Look, num_seeds: int, margin: float) -> tuple[Interval | None, float]:
    """Interval for new seeds and new test images, and p of a mean at the margin.

    At a single look with the degrees of freedom of the two-way variance. At one of several looks with the critical
    value that the interval of the seeds has there.
    """
    deviation = images.variance**0.5
    if not deviation:
        return (images.mean, images.mean), float(images.mean == margin)
    if not look.sentence:
        half_width = critical_t(look.level, images.df) * deviation
        p = two_sided_p((images.mean - margin) / deviation, images.df)
    else:
        half_width = look.critical(num_seeds) * deviation
        t = (images.mean - margin) / deviation
        p = e_p_value(e_value(t, num_seeds)) if look.by_e_value else two_sided_p(t, num_seeds - 1)
    return (images.mean - half_width, images.mean + half_width), p


# -- all arms ---------------------------------------------------------------------------------------------------------


def _combined(found: Sequence[Difference], look: Look) -> tuple[Outcome, str]:
    """Supported if one arm survives Holm's correction, contradicted if every arm is below the margin."""
    compared = [each for each in found if each.finding in COMPARED]
    corrected = holm([each.p for each in compared])
    above = [
        each.finding == "above the margin" and p is not None and p < look.level
        for each, p in zip(compared, corrected, strict=True)
    ]
    findings = {each.finding for each in found}
    if any(above):
        return "supported", "above the margin"
    if findings == {"below the margin"}:
        return "contradicted", "below the margin"
    if findings and findings <= {"below the margin", "there, but below the margin"}:
        return "contradicted", "there, but below the margin"
    for each in ("cannot be matched", "did not train"):
        if findings and findings <= {"cannot be matched", "did not train"} and each in findings:
            return "undecided", each
    return "undecided", ""


# -- text -------------------------------------------------------------------------------------------------------------


def _nothing(study: JudgedStudy) -> str:
    return f"No arm differs from {study.base.name} only in a larger batch, and perhaps in its length."


def _gap_text(study: JudgedStudy, found: Difference) -> str:
    arm, base = found.arm, study.base
    lost = study.lost(arm, base)
    ends = ""
    if lost:
        ends = f" At the end it loses {study.described(lost)} on test samples" + _parts(study, arm, lost) + "."
    if not found.match.how or found.finding in ("cannot be matched", "did not train"):
        return f"{arm.name}: {found.finding} ({found.reason}).{ends}"
    where = "on new images" if found.on_new_images else "on these images"
    text = described(found.values, study.show, found.interval)
    words = f"{arm.name} loses {text}{study.unit} at equal training, {where}: {found.finding}"
    if found.finding == "undecided" and not found.reason.endswith("missing"):
        words += f", detectable {_detectable(study, found.values)}"
    return f"{words} ({found.reason}).{ends}"


def _detectable(study: JudgedStudy, values: Outcomes) -> str:
    array = array_of(values)
    if len(array) < 2 or are_equal(array):
        return "with more pairs only"
    return study.show(minimum_detectable_effect(float(array.std(ddof=1)), len(array)), signed=False) + study.unit


def _parts(study: JudgedStudy, arm: Arm, lost: Outcomes) -> str:
    """Test loss as the sum of what is lost in training, and of the growth of the train-test gap."""
    training = study.training[arm.name].difference
    in_training = {seed: -training[seed] for seed in lost if seed in training}
    if not in_training:
        return ""
    gap = differences(lost, in_training)
    return f", of which {study.described(in_training)} on training samples and {study.described(gap)} between the two"


def _growth_text(study: JudgedStudy, found: Difference) -> str:
    arm, base = found.arm, study.base
    since = [_since_untrained(study, each) for each in (base, arm)]
    changes = f" Since their own untrained networks: {base.name} {since[0]}, {arm.name} {since[1]}."
    if not found.match.how or not found.values:
        ends = share(study.growth(arm, base), study.look) if study.growth(arm, base) else "not known"
        return f"{arm.name}: {found.finding} ({found.reason}); at the end {ends}.{changes}"
    text = described(found.values, "{:+.3f}".format, found.interval)
    return f"{arm.name} {text} at equal training: {found.finding}.{changes}"


def _since_untrained(study: JudgedStudy, arm: Arm) -> str:
    runs = study.trained(arm).runs.values()
    changes = [
        run.near_rank_loss - run.near_rank_loss_untrained
        for run in runs
        if run.near_rank_loss is not None and run.near_rank_loss_untrained is not None
    ]
    return f"{fmean(changes):+.3f}" if changes else "not known"


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
