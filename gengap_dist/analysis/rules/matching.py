"""Rule 2, first half: are two arms equal in training, so that their test scores can be compared?

Two ways. Finished: both ended at about the same training loss, or both at a training accuracy of nearly 100%; the ends
are compared. By the curve: scores on validation samples are compared at the same training loss, where both learning
rates are low or both schedules are constant. Without that condition one would compare phases of the learning rate: the
same batch with a constant rate and with a cosine differs by a point at equal loss, and by nothing at the end.
"""

import math
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.results import Curve, Run
from gengap_dist.analysis.rules.judged import JudgedStudy, Outcomes
from gengap_dist.analysis.rules.look import array_of
from gengap_dist.statistics.equivalence import is_equivalent
from gengap_dist.statistics.isotonic import LossCurve, matched_losses

SAME_LOSS = math.log(2)  # of the final training losses' ratio
NEARLY_ALL = 0.995  # of the training samples: there the losses need not be the same
LOW_RATE = 0.1  # of the highest learning rate of the run
QUARTER = 0.25  # of the margin: the error of a match by the curve

How = Literal["finished", "curve", ""]


class Match(NamedTuple):
    """Quantities of a baseline and an arm that were compared at equal training."""

    how: How
    """Empty: they cannot be matched."""
    reason: str
    """How they were matched, or why not: a clause."""
    base_scores: Outcomes = {}
    scores: Outcomes = {}
    base_near_rank_losses: Outcomes = {}
    near_rank_losses: Outcomes = {}


def match(study: JudgedStudy, arm: Arm, base: Arm, *, only_curve: bool = False) -> Match:
    """Match an arm with the baseline, over the seeds with which both trained.

    Args:
        study: that is judged.
        arm: not the baseline.
        base: the baseline.
        only_curve: do not compare the ends, as for the negative control of a match by the curve.
    """
    if not only_curve and (reason := _finished(study, arm)):
        first, second = study.trained(base), study.trained(arm)
        near_rank = [study.near_rank_losses(each) for each in (base, arm)]
        if not study.growth(arm, base):
            near_rank = [{}, {}]
        return Match("finished", reason, first.scores(), second.scores(), *near_rank)
    return _by_curve(study, arm, base)


def _finished(study: JudgedStudy, arm: Arm) -> str:
    """How the ends of an arm and of the baseline are equal in training; empty if they are not."""
    training = study.training[arm.name]
    ratios = array_of(training.log_loss_ratio)
    if len(ratios) and is_equivalent(ratios, SAME_LOSS):
        return f"the final training losses differ by a factor of {math.exp(abs(float(ratios.mean()))):.2f}"
    if study.metric.unit == "share" and training.label == "as well":
        means = [_mean_training(study.trained(each)) for each in (arm, study.base)]
        if min(means) >= NEARLY_ALL:
            return f"both end at {min(means):.2%} or more on training samples"
    return ""


def _mean_training(arm: Arm) -> float:
    return fmean([run.train_score for run in arm.runs.values() if run.train_score is not None] or [0.0])


# -- by the curve -----------------------------------------------------------------------------------------------------


class _Matched(NamedTuple):
    scores: tuple[float, float]
    """Of the first and the second run."""
    near_rank_losses: tuple[float, float]
    rate_shares: tuple[float, float]
    """Learning rates at the matched loss, as shares of their highest ones."""
    error: float
    """Slope of the score on the log loss times the residual deviation of the log loss, the larger of the two."""


def _by_curve(study: JudgedStudy, arm: Arm, base: Arm) -> Match:
    one, other = study.trained(base), study.trained(arm)
    seeds = sorted(one.runs.keys() & other.runs.keys())
    pairs = {seed: found for seed in seeds if (found := _matched(one.runs[seed], other.runs[seed]))}
    if not pairs or len(pairs) < len(seeds):
        ratios = study.training[arm.name].log_loss_ratio.values()
        by = f" by a factor of {math.exp(abs(fmean(ratios))):.2g}" if ratios else ""
        return Match("", f"the final training losses differ{by}, and no curve of both was recorded")
    rates = [fmean(pair.rate_shares[at] for pair in pairs.values()) for at in (0, 1)]
    constant = all(each.settings.get("optim.schedule") == "constant" for each in (arm, base))
    if not constant and max(rates) > LOW_RATE:
        return Match(
            "", f"at this loss the learning rates stand at {rates[0]:.0%} and {rates[1]:.0%} of their highest values"
        )
    error = fmean(pair.error for pair in pairs.values())
    if not error <= QUARTER * study.margin:
        return Match(
            "",
            f"the noise of the loss moves the score by {study.show(error, signed=False)}{study.unit}, more than a "
            "quarter of the margin",
        )
    columns = [
        {seed: value for seed, pair in pairs.items() if math.isfinite(value := values(pair))}
        for values in (
            lambda pair: pair.scores[0],
            lambda pair: pair.scores[1],
            lambda pair: pair.near_rank_losses[0],
            lambda pair: pair.near_rank_losses[1],
        )
    ]
    return Match("curve", "compared on validation samples at equal training loss", *columns)


def _matched(one: Run, other: Run) -> _Matched | None:
    """Both runs where their fitted losses are the same; None if one of them has no curve."""
    if one.curve is None or other.curve is None:
        return None
    curves = [_loss_curve(run.curve, run.curve.scores) for run in (one, other) if run.curve]
    ranks = [_loss_curve(run.curve, run.curve.near_rank_losses) for run in (one, other) if run.curve]
    if any(curve is None for curve in curves):
        return None
    fitted = [curve for curve in curves if curve]
    at = matched_losses([curve.final_log_loss for curve in fitted])
    scores = [float(np.mean(curve.score_at(at))) for curve in fitted]
    if not all(map(math.isfinite, scores)):
        return None
    near_rank = [float(np.mean(curve.score_at(at))) if curve else math.nan for curve in ranks]
    rates = [
        float(np.interp(curve.step_at(float(at[0])), run.curve.steps, run.curve.rate_shares))
        for curve, run in zip(fitted, (one, other), strict=True)
        if run.curve
    ]
    # a curve that falls at every measurement shows no noise: its residual deviation is nan
    errors = [abs(float(np.mean(curve.slope_at(at)))) * np.nan_to_num(curve.residual_deviation) for curve in fitted]
    return _Matched((scores[0], scores[1]), (near_rank[0], near_rank[1]), (rates[0], rates[1]), max(errors))


def _loss_curve(curve: Curve, values: np.ndarray) -> LossCurve | None:
    known = np.isfinite(curve.losses) & np.isfinite(values) & (curve.losses > 0)
    if known.sum() < 2:
        return None
    return LossCurve.of(curve.steps[known], curve.losses[known], values[known])
