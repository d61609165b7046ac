"""Updates to a target by global batch (Shallue et al. 2019); the critical batch (McCandlish et al. 2018)."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from gengap_dist.analysis.results import Run, Target
from gengap_dist.statistics.paired import CONFIDENCE

NOISE_SCALE = "noise_scale"
MAX_EXTRAPOLATION = 10.0  # B_crit may lie at most this factor outside the batch sizes that were tried


def updates_to_target(runs: Sequence[Run], baseline: str) -> Target | None:
    """Updates that each run needed to reach its target; None if no run had a target, or runs had different ones.

    The curve S = S_min (1 + B_crit / B) is fitted to the runs of the fastest arm of each batch size; arms with a run
    that missed the target are excluded.
    """
    with_target = [run for run in runs if run.target is not None]
    targets = {run.target for run in runs if run.target is not None}
    if len(targets) != 1:
        return None
    updates: dict[str, dict[int, int]] = {}
    missed: dict[str, int] = {}
    for run in with_target:
        if run.status == "finished" and run.updates_to_target is not None:
            updates.setdefault(run.arm, {})[run.seed] = run.updates_to_target
        elif run.status != "running":
            missed[run.arm] = missed.get(run.arm, 0) + 1
    sizes = {run.arm: run.global_size for run in with_target}
    fastest: dict[int, str] = {}
    for arm, by_seed in updates.items():
        fastest_so_far = fastest.get(sizes[arm])
        if arm not in missed and (fastest_so_far is None or _mean(by_seed) < _mean(updates[fastest_so_far])):
            fastest[sizes[arm]] = arm
    points = [(size, steps) for size, arm in fastest.items() for steps in updates[arm].values() if steps > 0]
    enough = len({size for size, _ in points}) > 2
    fit = fit_curve(*zip(*points, strict=True)) if enough else None
    noise = [run.measures[NOISE_SCALE] for run in runs if run.arm == baseline and NOISE_SCALE in run.measures]
    least_updates, critical_batch, interval = fit or (None, None, None)
    scale = float(np.median(noise)) if noise else None
    return Target(targets.pop(), updates, missed, least_updates, critical_batch, interval, scale)


def _mean(by_seed: Mapping[int, int]) -> float:
    return sum(by_seed.values()) / len(by_seed)


def fit_curve(
    sizes: Sequence[float], updates: Sequence[float]
) -> tuple[float, float, tuple[float, float] | None] | None:
    """S_min, B_crit and its 95% interval of S = S_min (1 + B_crit / B), by least squares of log S.

    The interval is a t interval of log B_crit from the curvature of the fit; None without spare observations, or where
    the data do not determine B_crit. The result is None if no fit is found, or if B_crit is more than 10 times outside
    the batch sizes that were tried: flat updates, or perfect scaling.

    >>> sizes = [16, 64, 256, 1024]
    >>> least, critical, _ = fit_curve(sizes, [100 * (1 + 200 / size) for size in sizes])
    >>> round(least), round(critical)
    (100, 200)
    """
    from scipy import optimize, stats  # slow to import, and needed only with a target

    b, log_s = np.array(sizes, dtype=float), np.log(np.array(updates, dtype=float))

    def curve(b: np.ndarray, log_least: float, log_critical: float) -> np.ndarray:
        return log_least + np.logaddexp(0.0, log_critical - np.log(b))

    start = (float(log_s.min()), float(np.log(np.median(b))))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)  # a curvature of zero: handled below
            log_fit, covariance, *_ = optimize.curve_fit(curve, b, log_s, p0=start, maxfev=10000)
    except RuntimeError:
        return None
    if not b.min() / MAX_EXTRAPOLATION <= np.exp(log_fit[1]) <= b.max() * MAX_EXTRAPOLATION:
        return None
    df, variance = len(b) - 2, float(covariance[1, 1])
    interval = None
    if df > 0 and np.isfinite(variance):
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * variance**0.5
        ends = np.exp(np.clip([log_fit[1] - half, log_fit[1] + half], -700, 700))
        interval = (float(ends[0]), float(ends[1]))
    return float(np.exp(log_fit[0])), float(np.exp(log_fit[1])), interval
