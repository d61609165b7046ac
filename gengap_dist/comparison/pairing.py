"""Paired comparison of arms: same seed, same initialisation, same order seed; only the arm differs."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999


class Paired(NamedTuple):
    """Mean of paired differences, with two intervals: which to trust is in the note of `paired`."""

    mean: float
    bootstrap: tuple[float, float] | None
    """95% percentile bootstrap over pairs; None for fewer than two pairs."""
    student: tuple[float, float] | None
    """95% Student t interval; None for fewer than two pairs."""
    differences: dict[int, float]
    """Seed to difference."""


def paired(baseline: Mapping[int, float], arm: Mapping[int, float]) -> Paired:
    """Baseline minus arm over the seeds that both have.

    The bootstrap interval assumes nothing, but n pairs give it at most n distinct values to draw from: with 3 pairs it
    never reaches beyond the smallest and largest difference, and covers the truth far less often than 95%. The t
    interval assumes normal differences and keeps its level for any n. For few pairs read the t interval.

    Raises:
        ValueError: if no seed is in both.

    >>> result = paired({0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.8, 1: 0.7, 2: 0.75})
    >>> round(result.mean, 9), sorted(result.differences)
    (0.1, [0, 1, 2])
    """
    seeds = sorted(baseline.keys() & arm.keys())
    if not seeds:
        raise ValueError("no seed was run by both arms: run the same seeds for all arms")
    differences = np.array([baseline[seed] - arm[seed] for seed in seeds])
    bootstrap = student = None
    if len(seeds) > 1:
        drawn = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        bootstrap = (float(drawn.low), float(drawn.high))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * differences.std(ddof=1) / len(seeds) ** 0.5
        student = (float(differences.mean() - half), float(differences.mean() + half))
    by_seed = {seed: float(difference) for seed, difference in zip(seeds, differences, strict=True)}
    return Paired(float(differences.mean()), bootstrap, student, by_seed)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) over seeds; the deviation of one value is nan.

    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else float("nan")
