"""Aggregates the runs of an arm over its seeds: mean and interval at every step that all seeds have.

Pure functions of the contents of run folders.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.config.measures import PRIMARY, PRIMARY_VIEWS
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.runs.metric import metric_of, score_of
from gengap_dist.runs.metrics_table import MetricsTable
from gengap_dist.runs.run_folder import SeedRun
from gengap_dist.statistics.paired import Interval, paired, t_half_width, t_interval

Line = dict[str, Any]
ANY: Interval = (-math.inf, math.inf)


class Curve(NamedTuple):
    """Means of one metric over seeds, and half-widths of their 95% intervals, where all seeds have it."""

    at: np.ndarray
    """int64 [points], increasing: indices of `Curves.steps`."""
    mean: np.ndarray
    """float64 [points]."""
    ci_half_width: np.ndarray
    """float64 [points]: t_{0.975, n-1} s / sqrt(n); nan for one seed and for values that are not finite."""


class Curves(NamedTuple):
    """Means over seeds at the steps that all of them have."""

    steps: np.ndarray
    """int64 [steps], increasing."""
    seconds: np.ndarray
    """float64 [steps]: mean time since the start of the runs."""
    by_name: Mapping[str, Curve]


def summary(name: str, values: Sequence[float], limits: Interval = ANY) -> dict[str, float]:
    """Mean of a value over seeds, and its 95% interval m +- t s / sqrt(n) (Student); one seed has no interval.

    The interval is cut to `limits`, between which the value must be.

    >>> {name: round(value, 3) for name, value in summary("a", [1.0, 2.0, 3.0]).items()}
    {'a/mean': 2.0, 'a/ci_low': -0.484, 'a/ci_high': 4.484}
    >>> summary("a", [1.0])
    {'a/mean': 1.0}
    >>> summary("a", [0.875, 1.0], (0.0, 1.0))
    {'a/mean': 0.9375, 'a/ci_low': 0.14336220398908162, 'a/ci_high': 1.0}
    """
    mean = {f"{name}/mean": float(np.mean(values))}
    interval = t_interval(values) if np.isfinite(values).all() else None
    return mean | (
        {f"{name}/ci_low": max(interval[0], limits[0]), f"{name}/ci_high": min(interval[1], limits[1])}
        if interval
        else {}
    )


def over_seeds(arm: Sequence[SeedRun], baseline: Sequence[SeedRun] = ()) -> list[Line]:
    """Lines as in metrics.jsonl, in increasing order of step; the last one also has the results.

    Curves are NAME/mean, /ci_low and /ci_high over the finished seeds, at the steps where all of them have NAME.
    Results have NAME/num_seeds as well, `sb_lb_gap` is the baseline's score on the test samples minus the arm's, paired
    by seed, and `num_runs/STATUS` counts all runs, including those without a result.

    Args:
        arm: all runs of the arm.
        baseline: all runs of the baseline; none for the baseline itself.
    """
    finished = [seed for seed in arm if seed.info["status"] == "finished"]
    recorded = bool(finished) and all(seed.history.num_lines for seed in finished)
    shares = {metric.name for seed in finished if (metric := metric_of(seed.info)).unit == "share"}
    lines = _lines(curves([seed.history for seed in finished]), shares) if recorded else []
    if not lines:
        lines = [{"step": 0, "seconds": 0.0}]
    last = lines[-1]
    for name in sorted(set[str]().union(*(seed.info["result"] for seed in finished))):
        values = [seed.info["result"].get(name) for seed in finished]
        numbers = [float(value) for value in values if isinstance(value, int | float | str)]
        if numbers and not name.startswith("time/"):
            last |= summary(name, numbers, _limits(name, shares)) | {f"{name}/num_seeds": len(numbers)}
    of_baseline, of_arm = _scores(baseline), _scores(arm)
    if of_baseline.keys() & of_arm.keys():
        gap = paired(of_baseline, of_arm)
        last |= {"sb_lb_gap/mean": gap.mean, "sb_lb_gap/num_seeds": len(gap.differences)}
        if gap.student:
            last |= {"sb_lb_gap/ci_low": gap.student[0], "sb_lb_gap/ci_high": gap.student[1]}
    counts = Counter(seed.info["status"] for seed in arm)
    last |= {f"num_runs/{status}": float(number) for status, number in counts.items()}
    return lines


def curves(runs: Sequence[MetricsTable]) -> Curves:
    """Losses, validation metrics, and measures that may explain a gap, over runs that have recorded something.

    The training loss is kept only at steps that also have a validation.
    """
    steps = reduce(np.intersect1d, (run.series("step")[1] for run in runs))
    names = [name for name in runs[0].columns if _charted(name) and all(name in run.columns for run in runs)]
    validated = np.zeros(len(steps), dtype=bool)
    for name in names:
        if name.startswith("val/"):
            validated |= _over_seeds(runs, steps, name)[1]
    by_name: dict[str, Curve] = {}
    for name in names:
        values, known = _over_seeds(runs, steps, name)
        at = np.flatnonzero(known & validated if name == "train/loss" else known)
        by_name[name] = Curve(at, *_mean_and_half_width(values[:, at]))
    return Curves(steps.astype(np.int64), _over_seeds(runs, steps, "seconds")[0].mean(axis=0), by_name)


def _over_seeds(runs: Sequence[MetricsTable], steps: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a metric, float64 [seeds, steps], and whether all seeds have it, bool [steps]."""
    found = [run.values_at(steps, [name]) for run in runs]
    return np.stack([values[:, 0] for values, _ in found]), np.all([known[:, 0] for _, known in found], axis=0)


def _mean_and_half_width(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Curve`: [seeds, points] to [points] each."""
    mean = values.mean(axis=0)
    with np.errstate(invalid="ignore"):  # inf - inf
        return mean, t_half_width(values) if len(values) > 1 else np.full(mean.shape, np.nan)


def select_charted(run: MetricsTable) -> MetricsTable:
    """The part of a run's metrics that `curves` reads."""
    return run.select_columns([name for name in run.columns if name in ("step", "seconds") or _charted(name)])


def _limits(name: str, shares: Collection[str]) -> Interval:
    """Between which values of a metric must be; `shares` are the metrics of the task that are between 0 and 1.

    >>> _limits("val/accuracy", {"accuracy"}), _limits("val/loss", {"accuracy"})
    ((0.0, 1.0), (-inf, inf))
    """
    is_share = name.endswith(tuple(f"/{share}" for share in shares)) or MetricKey.parse(name).known.is_share
    return (0.0, 1.0) if is_share else ANY


def _lines(curves: Curves, shares: Collection[str]) -> list[Line]:
    """Lines as in metrics.jsonl: the steps with at least one curve, and the last step."""
    lines: list[Line] = [
        {"step": step, "seconds": seconds}
        for step, seconds in zip(curves.steps.tolist(), curves.seconds.tolist(), strict=True)
    ]
    for name, curve in curves.by_name.items():
        low, high = _limits(name, shares)
        for at, mean, half_width in zip(*(values.tolist() for values in curve), strict=True):
            lines[at][f"{name}/mean"] = mean
            if math.isfinite(half_width):
                lines[at] |= {
                    f"{name}/ci_low": max(mean - half_width, low),
                    f"{name}/ci_high": min(mean + half_width, high),
                }
    return [line for number, line in enumerate(lines, 1) if len(line) > 2 or number == len(lines)]


def _charted(name: str) -> bool:
    key = MetricKey.parse(name)
    is_primary = f"{key.measure}/{key.threshold}" == PRIMARY and key.view in PRIMARY_VIEWS and not key.probe_set
    explains = key.known.is_explanation and not key.is_control and not key.known.is_derived
    return explains or is_primary or name == "train/loss" or name.startswith(("val/", "probe/"))


def _scores(seeds: Sequence[SeedRun]) -> dict[int, float]:
    """Seed to score on the test samples, for the runs that have one."""
    scores = {seed.info["seed"]: score_of(seed.info) for seed in seeds}
    return {seed: score for seed, score in scores.items() if score is not None}
