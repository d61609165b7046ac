"""Rule 1: did the runs of an arm train, and did they train as well as those of the baseline?

A run trained if it finished, and its score on the training samples is at least half-way from chance to the mean of the
baseline. Without a score on training samples every finished run counts as trained, and that is said.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.statistics.equivalence import is_equivalent
from gengap_dist.statistics.paired import differences

HALF_WAY = 0.5
BARELY = 0.1  # of the way from chance to a perfect share: a baseline below it has learned nothing

Label = Literal["baseline", "did not train", "as well", "less", "more", "unclear", "not measured"]


class Training(NamedTuple):
    """How an arm trained, against the baseline."""

    label: Label
    seeds: frozenset[int]
    """Of all runs of the arm, with any status."""
    trained: frozenset[int]
    """Seeds of the runs that trained."""
    difference: Mapping[int, float]
    """Seed to the score on training samples minus the baseline's, of pairs that trained."""
    log_loss_ratio: Mapping[int, float]
    """Seed to log(loss on training samples / the baseline's). At an accuracy of 100% losses still differ by factors."""
    margin: float
    """Largest difference of training scores that is "as well"."""

    @property
    def num_failed(self) -> int:
        """Runs that did not train."""
        return len(self.seeds) - len(self.trained)

    def __str__(self) -> str:
        if self.num_failed:
            return f"did not train in {self.num_failed} of {len(self.seeds)}"
        return self.label


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
    trained = {name: frozenset(_trained_seeds(arm, level)) for name, arm in arms.items()}
    return {name: _judged(arm, base, trained, margin, look) for name, arm in arms.items()}


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


def training_margin(margin: float, lost: float) -> float:
    """Largest difference of training scores that is "as well": min(2 m, max(m / 2, lost / 2)).

    With a margin of half a point it is at least a quarter, at most one, and else half of what is lost on test samples.

    >>> training_margin(0.5, 0.1), training_margin(0.5, 1.2), training_margin(0.5, 9.0)
    (0.25, 0.6, 1.0)
    """
    return min(2 * margin, max(margin / 2, lost / 2))


def _training_scores(arm: Arm) -> dict[int, float]:
    return {seed: run.train_score for seed, run in arm.runs.items() if run.train_score is not None}


def _trained_seeds(arm: Arm, level: float) -> list[int]:
    if level == -math.inf:
        return [*arm.runs]
    return [seed for seed, score in _training_scores(arm).items() if score >= level]


def _judged(arm: Arm, base: Arm, trained: Mapping[str, frozenset[int]], margin: float, look: Look) -> Training:
    seeds = frozenset({*arm.runs, *arm.unfinished})
    both = sorted(trained[arm.name] & trained[base.name])
    pairs = [(seed, arm.runs[seed], base.runs[seed]) for seed in both]
    difference = differences(
        {seed: run.train_score for seed, run, _ in pairs if run.train_score is not None},
        {seed: run.train_score for seed, _, run in pairs if run.train_score is not None},
    )
    ratio = {
        seed: math.log(run.train_loss / other.train_loss)
        for seed, run, other in pairs
        if run.train_loss and other.train_loss and run.train_loss > 0 and other.train_loss > 0
    }
    lost = differences(base.scores(), arm.scores())
    lost_by_pairs = [lost[seed] for seed in both if seed in lost]
    largest = training_margin(margin, fmean(lost_by_pairs) if lost_by_pairs else 0.0)
    label: Label
    if seeds != trained[arm.name]:
        label = "did not train"
    elif arm.name == base.name:
        label = "baseline"
    elif not difference:
        label = "not measured"
    else:
        label = _label(array_of(difference), largest, look)
    return Training(label, seeds, trained[arm.name], difference, ratio, largest)


def _label(difference: np.ndarray, margin: float, look: Look) -> Label:
    if is_equivalent(difference, margin):
        return "as well"
    if look.is_below(difference):
        return "less"
    return "more" if look.is_above(difference) else "unclear"
