"""Rule 2, first half: are two arms equal in training, so that their test scores can be compared?

Two ways. Finished: both ended at about the same training loss and training score, so that the rest of the difference in
loss is worth less than a quarter of the margin; the ends are compared. By the curve: scores on validation samples are
compared at the same training loss, where both learning rates are low or both schedules are constant. Without that
condition one would compare phases of the learning rate: the same batch with a constant rate and with a cosine differs
by a point at equal loss, and by nothing at the end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
QUARTER = 0.25  # of the margin: the largest error of a match
LAST_PART = math.log(4)  # of the log loss, before the end: there the slope of the score is taken
FEW_POINTS = 6  # of all runs: with fewer the slope is not known
WIDE = 0.6  # log loss between two measurements: more is too coarse to interpolate, unless the score hardly changes

MEASURE_ALL = "run again with --probe.max_time_fraction null"

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
    score_error: float = 0.0
    """By the curve: what the noise of the loss may add to a score."""
    near_rank_error: float = 0.0


def match(study: JudgedStudy, arm: Arm, base: Arm, *, only_curve: bool = False) -> Match:
    """Match an arm with the baseline, over the seeds with which both trained.

    Args:
        study: that is judged.
        arm: not the baseline.
        base: the baseline.
        only_curve: do not compare the ends, as for the negative control of a match by the curve.
    """
    finished, reason = (False, "") if only_curve else _finished(study, arm)
    if finished:
        first, second = study.trained(base), study.trained(arm)
        before, after = (study.near_rank_losses(each) if study.growth(arm, base) else {} for each in (base, arm))
        return Match("finished", reason, first.scores(), second.scores(), before, after)
    matched = _by_curve(study, arm, base)
    return matched if matched.how or not reason else matched._replace(reason=f"{reason}; {matched.reason}")


def _finished(study: JudgedStudy, arm: Arm) -> tuple[bool, str]:
    """Whether the ends of an arm and of the baseline are equal in training, and how or why not."""
    training = study.training[arm.name]
    ratios = array_of(training.log_loss_ratio)
    if study.metric.unit == "share" and training.label == "as well":
        means = [_mean_training(study.trained(each)) for each in (arm, study.base)]
        if min(means) >= NEARLY_ALL:
            how_many = "all" if min(means) == 1 else f"at least {min(means):.2%}"
            return True, f"both have {how_many} of the training samples right"
    if not len(ratios) or not is_equivalent(ratios, SAME_LOSS):
        return False, ""
    factor = f"the final training losses differ by a factor of {math.exp(abs(float(ratios.mean()))):.2f}"
    slope, difference = _final_slope(study, arm), array_of(training.difference)
    # with curves their slope says what the ratio of losses is worth; without them training scores must surely agree
    apart = len(difference) and abs(float(difference.mean())) > training.margin
    if len(difference) and (apart or (slope is None and not is_equivalent(difference, training.margin))):
        return False, f"{factor}, and the training scores by {study.described(training.difference)}{study.unit}"
    worth = abs((slope or 0.0) * float(ratios.mean()))
    if worth > QUARTER * study.margin:
        shown = f"{study.show(worth, signed=False)}{study.unit}"
        return False, f"{factor}, worth {shown} by the slope of the curves, more than a quarter of the margin"
    return True, factor


def _mean_training(arm: Arm) -> float:
    return fmean([run.train_score for run in arm.runs.values() if run.train_score is not None] or [0.0])


def _final_slope(study: JudgedStudy, arm: Arm) -> float | None:
    """Change of the validation score with log loss in the last part of the curves of both arms; None if not known.

    Least squares over all runs, each with an intercept of its own.
    """
    x, y = [], []
    for run in (*study.trained(arm).runs.values(), *study.trained(study.base).runs.values()):
        if run.curve is None:
            continue
        known = np.isfinite(run.curve.losses) & np.isfinite(run.curve.scores) & (run.curve.losses > 0)
        logs, scores = np.log(run.curve.losses[known]), run.curve.scores[known]
        last = logs <= logs[-1] + LAST_PART if len(logs) else np.zeros(0, dtype=bool)
        x += [*(logs[last] - logs[last].mean())] if last.any() else []
        y += [*(scores[last] - scores[last].mean())] if last.any() else []
    first, second = np.array(x), np.array(y)
    return float(first @ second / (first @ first)) if len(x) >= FEW_POINTS and first @ first > 0 else None


# -- by the curve -----------------------------------------------------------------------------------------------------


class _Matched(NamedTuple):
    """Quantities of two runs where their fitted losses are the same, those of the first run first."""

    scores: tuple[float, float]
    near_rank_losses: tuple[float, float]
    rate_shares: tuple[float, float]
    """Learning rates at the matched loss, as shares of their highest ones."""
    score_error: float
    """Slope of the score on the log loss times the residual deviation of the log loss, the larger of the two."""
    near_rank_error: float
    too_coarse: bool
    """Whether measurements lie too far apart there."""


def _by_curve(study: JudgedStudy, arm: Arm, base: Arm) -> Match:
    one, other = study.trained(base), study.trained(arm)
    seeds = sorted(one.runs.keys() & other.runs.keys())
    if not seeds or any(each.runs[seed].curve is None for each in (one, other) for seed in seeds):
        ratios = study.training[arm.name].log_loss_ratio.values()
        by = f" by a factor of {math.exp(abs(fmean(ratios))):.2g}" if ratios else ""
        return Match("", f"the final training losses differ{by}, and no curve of both was recorded")
    pairs = {seed: found for seed in seeds if (found := _matched(one.runs[seed], other.runs[seed], study.margin))}
    if len(pairs) < len(seeds):
        return Match("", "their curves have no training loss in common")
    rates = [fmean(pair.rate_shares[at] for pair in pairs.values()) for at in (0, 1)]
    constant = all(each.settings.get("optim.schedule") == "constant" for each in (arm, base))
    if not constant and max(rates) > LOW_RATE:
        return Match(
            "", f"at this loss the learning rates stand at {rates[0]:.0%} and {rates[1]:.0%} of their highest values"
        )
    if any(pair.too_coarse for pair in pairs.values()):
        return Match("", f"they were measured too rarely near this loss{_skipped(one, other)}")
    column = _columns(pairs)
    return Match(
        "curve",
        "compared at equal training loss",
        column(lambda pair: pair.scores[0]),
        column(lambda pair: pair.scores[1]),
        column(lambda pair: pair.near_rank_losses[0]),
        column(lambda pair: pair.near_rank_losses[1]),
        fmean(pair.score_error for pair in pairs.values()),
        fmean(pair.near_rank_error for pair in pairs.values()),
    )


def _skipped(*arms: Arm) -> str:
    """That measurements were left out to save time, how many of a run, and what to do; empty if none was."""
    counts = [run.num_skipped for arm in arms for run in arm.runs.values() if run.num_skipped]
    if not counts:
        return ""
    return f": probe.max_time_fraction left out {number_range(counts)} of a run; {MEASURE_ALL}"


def number_range(counts: Sequence[int]) -> str:
    """The smallest and the largest number of measurements.

    >>> number_range([19, 9]), number_range([1])
    ('9 to 19 measurements', '1 measurement')
    """
    low, high = min(counts), max(counts)
    return (f"{low}" if low == high else f"{low} to {high}") + (" measurement" if high == 1 else " measurements")


def _columns(pairs: Mapping[int, _Matched]) -> Callable[[Callable[[_Matched], float]], dict[int, float]]:
    def column(value: Callable[[_Matched], float]) -> dict[int, float]:
        return {seed: found for seed, pair in pairs.items() if math.isfinite(found := value(pair))}

    return column


def _matched(one: Run, other: Run, margin: float) -> _Matched | None:
    """Both runs where their fitted losses are the same; None if there is no such loss."""
    curves = [run.curve for run in (one, other) if run.curve is not None]
    fitted = [curve for each in curves if (curve := _loss_curve(each, each.scores))]
    if len(fitted) < 2:
        return None
    at = matched_losses(fitted)
    scores = [float(np.mean(curve.score_at(at))) for curve in fitted]
    if not all(map(math.isfinite, scores)):
        return None
    ranks = [_loss_curve(each, each.near_rank_losses) for each in curves]
    near_rank = [float(np.mean(curve.score_at(at))) if curve else math.nan for curve in ranks]
    rates = [
        float(np.interp(curve.step_at(float(at[0])), each.steps, each.rate_shares))
        for curve, each in zip(fitted, curves, strict=True)
    ]
    return _Matched(
        (scores[0], scores[1]),
        (near_rank[0], near_rank[1]),
        (rates[0], rates[1]),
        max(_error(curve, at) for curve in fitted),
        max((_error(curve, at) for curve in ranks if curve), default=0.0),
        any(_too_coarse(curve, at, QUARTER * margin) for curve in fitted),
    )


def _error(curve: LossCurve, at: np.ndarray) -> float:
    """What the noise of the loss may add to the value at these log losses; 0 for a curve that shows no noise.

    The residual deviation is nan where the loss falls at every measurement.
    """
    return abs(float(np.mean(np.nan_to_num(curve.slope_at(at))))) * float(np.nan_to_num(curve.residual_deviation))


def _too_coarse(curve: LossCurve, at: np.ndarray, change: float) -> bool:
    """Whether two neighbouring blocks around these log losses are far apart, in log loss and by `change` in score."""
    upper, lower = curve.log_losses[:-1], curve.log_losses[1:]
    near = (upper > at.min()) & (lower < at.max())
    return bool((near & (upper - lower > WIDE) & (np.abs(np.diff(curve.scores)) > change)).any())


def _loss_curve(curve: Curve, values: np.ndarray) -> LossCurve | None:
    known = np.isfinite(curve.losses) & np.isfinite(values) & (curve.losses > 0)
    if known.sum() < 2:
        return None
    steps, losses, kept = (array[known] for array in (curve.steps, curve.losses, values))
    last: Sequence[bool] | np.ndarray = np.append(np.diff(steps) > 0, True)  # of several at one step the last
    return LossCurve.of(steps[last], losses[last], kept[last])
