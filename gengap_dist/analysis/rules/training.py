"""Rule 1: did the runs of an arm train, and did they train as well as those of the baseline?

A run trained if it finished, and its score on the training samples is at least half-way from chance to the mean of the
baseline. Without a score on training samples every finished run counts as trained, and that is said.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.statistics.equivalence import equivalence_power, is_equivalent
from gengap_dist.statistics.paired import differences

HALF_WAY = 0.5
BARELY = 0.1  # of the way from chance to a perfect share: a baseline below it has learned nothing

LEAST, MOST = 0.0025, 0.01  # of the margin of a share

Label = Literal["baseline", "did not train", "as well", "less", "more", "unclear", "not measured", "not judged"]


class Training(NamedTuple):
    """How an arm trained, against the baseline."""

    label: Label
    seeds: frozenset[int]
    """Of all runs of the arm, with any status."""
    trained: frozenset[int]
    """Seeds of the runs that trained."""
    num_failed: int
    """Runs that diverged, or ended without having trained."""
    difference: Mapping[int, float]
    """Seed to the score on training samples minus the baseline's, of pairs that trained."""
    log_loss_ratio: Mapping[int, float]
    """Seed to log(loss on training samples / the baseline's). At an accuracy of 100% losses still differ by factors."""
    margin: float
    """Largest difference of training scores that is "as well"."""

    @property
    def num_unknown(self) -> int:
        """Runs of which it is not known: failed, stopped, still running, or without a score on training samples."""
        return len(self.seeds) - len(self.trained) - self.num_failed

    @property
    def power(self) -> float:
        """Probability that an arm that trains exactly as the baseline, with this spread, is called "as well"."""
        values = array_of(self.difference)
        return equivalence_power(float(values.std(ddof=1)), len(values), self.margin) if len(values) > 1 else 0.0

    def __str__(self) -> str:
        if self.label == "not judged":
            return "not judged, because the baseline did not train"
        of = f"of {len(self.seeds)}"
        parts = [f"did not train in {self.num_failed} {of}"] * bool(self.num_failed)
        parts += [f"{self.num_unknown} {of} without a result"] * bool(self.num_unknown)
        return ", ".join(parts) or self.label


def judge_training(
    arms: Mapping[str, Arm], base: Arm, margin: float, look: Look, *, is_share: bool
) -> dict[str, Training]:
    """How each arm trained.

    Args:
        arms: all of them.
        base: the baseline.
        margin: difference of test scores that counts.
        look: for "less" and "more"; "as well" is a 90% interval at every look.
        is_share: whether the metric is a share, so that 1 is perfect.
    """
    level = trained_level(arms, base, is_share=is_share)
    trained = {name: _trained_seeds(arm, level) for name, arm in arms.items()}

    def judged(arm: Arm) -> Training:
        pairs = sorted(trained[arm.name] & trained[base.name])
        difference, ratio = _differences(arm, base, pairs)
        lost = differences(base.scores(), arm.scores())
        lost_by_pairs = [lost[seed] for seed in pairs if seed in lost]
        largest = training_margin(margin, fmean(lost_by_pairs) if lost_by_pairs else 0.0, is_share=is_share)
        seeds = frozenset({*arm.runs, *arm.unfinished})
        diverged = sum(run.status == "diverged" for run in arm.unfinished.values())
        known = _training_scores(arm) if level != -math.inf else arm.runs
        num_failed = diverged + sum(seed not in trained[arm.name] for seed in known)
        label: Label
        if level == math.inf and arm.name != base.name:
            label, num_failed = "not judged", 0
        elif num_failed:
            label = "did not train"
        elif arm.name == base.name:
            label = "baseline"
        elif seeds != trained[arm.name] or not difference:
            label = "not measured"
        else:
            label = _label(array_of(difference), largest, look)
        return Training(label, seeds, trained[arm.name], num_failed, difference, ratio, largest)

    return {name: judged(arm) for name, arm in arms.items()}


def trained_level(arms: Mapping[str, Arm], base: Arm, *, is_share: bool) -> float:
    """The lowest training score of a run that trained; infinity if the baseline did not, -infinity if none is known.

    The baseline did not train if it is not half-way from chance to the arm with the highest training score, or, for a
    share, not a tenth of the way from chance to 1.
    """
    scores = _training_scores(base)
    chance = [run.chance for run in base.runs.values() if run.chance is not None]
    if not scores or not chance:
        return -math.inf
    floor, reached = fmean(chance), fmean(scores.values())
    best = max(fmean(found.values()) for arm in arms.values() if (found := _training_scores(arm)))
    needed = floor + HALF_WAY * (best - floor)
    if is_share:
        needed = max(needed, floor + BARELY * (1 - floor))
    return floor + HALF_WAY * (reached - floor) if reached >= needed else math.inf


def training_margin(margin: float, lost: float, *, is_share: bool) -> float:
    """Largest difference of training scores that is "as well": half of what is lost on test samples, within limits.

    For a share at least a quarter and at most one percentage point; else half of the margin, and twice the margin.

    >>> [training_margin(0.005, lost, is_share=True) for lost in (0.001, 0.012, 0.09)]
    [0.0025, 0.006, 0.01]
    >>> training_margin(0.5, 9.0, is_share=False)
    1.0
    """
    least, most = (LEAST, MOST) if is_share else (margin / 2, 2 * margin)
    return min(most, max(least, lost / 2))


def _training_scores(arm: Arm) -> dict[int, float]:
    return {seed: run.train_score for seed, run in arm.runs.items() if run.train_score is not None}


def _trained_seeds(arm: Arm, level: float) -> frozenset[int]:
    if level == -math.inf:
        return frozenset(arm.runs)
    return frozenset(seed for seed, score in _training_scores(arm).items() if score >= level)


def _differences(arm: Arm, base: Arm, seeds: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Seed to the training score minus the baseline's, and to the logarithm of the ratio of training losses."""
    pairs = {seed: (arm.runs[seed], base.runs[seed]) for seed in seeds}
    difference = {
        seed: run.train_score - other.train_score
        for seed, (run, other) in pairs.items()
        if run.train_score is not None and other.train_score is not None
    }
    ratio = {
        seed: math.log(run.train_loss / other.train_loss)
        for seed, (run, other) in pairs.items()
        if run.train_loss and other.train_loss and run.train_loss > 0 and other.train_loss > 0
    }
    return difference, ratio


def _label(difference: np.ndarray, margin: float, look: Look) -> Label:
    if is_equivalent(difference, margin):
        return "as well"
    if look.is_below(difference):
        return "less"
    return "more" if look.is_above(difference) else "unclear"
