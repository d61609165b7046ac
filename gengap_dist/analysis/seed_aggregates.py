"""The runs of an arm as one: mean and interval over its seeds, at every step that all of them have.

Pure functions of what run folders hold.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.config.metric_key import CONTROLS, MEASURED
from gengap_dist.runs.metrics_table import MetricsTable
from gengap_dist.runs.run_folder import SeedRun
from gengap_dist.statistics.paired import paired, t_half, t_interval

CHARTED = re.compile("val/(accuracy|loss)|" + MEASURED)

Line = dict[str, Any]


class Curves(NamedTuple):
    """Means over seeds, and how far their 95% intervals reach, at the steps that all seeds have."""

    steps: np.ndarray
    """int64 [steps], rising."""
    seconds: np.ndarray
    """float64 [steps]: mean time since the runs began."""
    names: Sequence[str]
    mean: np.ndarray
    """float64 [steps, names]."""
    half: np.ndarray
    """Half of the interval, of the same shape: t_{0.975, n-1} s / sqrt(n); nan for one seed and for values that are not
    finite."""
    known: np.ndarray
    """bool of the same shape: whether all seeds have it there."""


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean of a value over seeds, and its 95% interval m +- t s / sqrt(n) (Student); one seed has no interval.

    >>> {name: round(value, 3) for name, value in summary("a", [1.0, 2.0, 3.0]).items()}
    {'a/mean': 2.0, 'a/ci_low': -0.484, 'a/ci_high': 4.484}
    >>> summary("a", [1.0])
    {'a/mean': 1.0}
    """
    mean = {f"{name}/mean": float(np.mean(values))}
    interval = t_interval(values) if np.isfinite(values).all() else None
    return mean | ({f"{name}/ci_low": interval[0], f"{name}/ci_high": interval[1]} if interval else {})


def over_seeds(arm: Sequence[SeedRun], baseline: Sequence[SeedRun] = ()) -> list[Line]:
    """Lines as those of metrics.jsonl, in rising order of step; the last one also has the results.

    Curves are NAME/mean, /ci_low and /ci_high over the finished seeds, at the steps where each of them has NAME.
    Results have NAME/num_seeds as well, `sb_lb_gap` is the baseline's test accuracy minus the arm's, paired by seed,
    and `num_runs/STATUS` counts all runs, those without a result too.

    Args:
        arm: all runs of the arm.
        baseline: all runs of the baseline; none for the baseline itself.
    """
    finished = [seed for seed in arm if seed.info["status"] == "finished"]
    recorded = bool(finished) and all(len(seed.history.values) for seed in finished)
    lines = _lines(curves([seed.history for seed in finished])) if recorded else []
    if not lines:
        lines = [{"step": 0, "seconds": 0.0}]
    last = lines[-1]
    for name in sorted(set[str]().union(*(seed.info["result"] for seed in finished))):
        values = [seed.info["result"].get(name) for seed in finished]
        numbers = [float(value) for value in values if isinstance(value, int | float | str)]
        if numbers and not name.startswith("time/"):
            last |= summary(name, numbers) | {f"{name}/num_seeds": len(numbers)}
    theirs, ours = _accuracies(baseline), _accuracies(arm)
    if theirs.keys() & ours.keys():
        gap = paired(theirs, ours)
        last |= {"sb_lb_gap/mean": gap.mean, "sb_lb_gap/num_seeds": len(gap.differences)}
        if gap.student:
            last |= {"sb_lb_gap/ci_low": gap.student[0], "sb_lb_gap/ci_high": gap.student[1]}
    counts = Counter(seed.info["status"] for seed in arm)
    last |= {f"num_runs/{status}": float(number) for status, number in counts.items()}
    return lines


def curves(runs: Sequence[MetricsTable]) -> Curves:
    """What is worth drawing (`CHARTED`) over runs that have recorded something, one or several.

    The loss of training counts only where validation stands beside it.
    """
    steps = reduce(np.intersect1d, (run.series("step")[1] for run in runs))
    names = [name for name in runs[0].columns if _charted(name) and all(name in run.columns for run in runs)]
    cells = [run.at(steps, ["seconds", *names]) for run in runs]
    values, known = np.stack([cell[0] for cell in cells]), np.all([cell[1] for cell in cells], axis=0)
    if "train/loss" in names:
        beside = known[:, 1 + names.index("val/accuracy")] if "val/accuracy" in names else False
        known[:, 1 + names.index("train/loss")] &= beside
    mean = values.mean(axis=0)
    with np.errstate(invalid="ignore"):  # inf - inf
        half = t_half(values) if len(runs) > 1 else np.full(mean.shape, np.nan)
    return Curves(steps.astype(np.int64), mean[:, 0], names, mean[:, 1:], half[:, 1:], known[:, 1:])


def _lines(found: Curves) -> list[Line]:
    """Lines as those of metrics.jsonl: steps that have a curve, and the last."""
    out: list[Line] = []
    for row, step in enumerate(found.steps.tolist()):
        line: Line = {"step": step, "seconds": float(found.seconds[row])}
        for column in np.flatnonzero(found.known[row]).tolist():
            name, mean, half = found.names[column], float(found.mean[row, column]), float(found.half[row, column])
            line[f"{name}/mean"] = mean
            if math.isfinite(half):
                line |= {f"{name}/ci_low": mean - half, f"{name}/ci_high": mean + half}
        if len(line) > 2 or row == len(found.steps) - 1:
            out.append(line)
    return out


def _charted(name: str) -> bool:
    return name == "train/loss" or (bool(CHARTED.fullmatch(name)) and not CONTROLS.search(name))


def _accuracies(seeds: Sequence[SeedRun]) -> dict[int, float]:
    """Seed to test accuracy, of the runs that have one."""
    found = {seed.info["seed"]: seed.info.get("result", {}).get("test/accuracy") for seed in seeds}
    return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}
