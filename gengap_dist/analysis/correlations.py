"""Correlation of each measure with the score lost: over the means of the arms that trained.

Correlation is not cause: these numbers decide no claim (see `claims`).
"""

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np

from gengap_dist.analysis.results import Correlation, Run
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.statistics.correlation import (
    fisher_interval,
    leave_one_out,
    partial_correlation,
    spearman,
    spearman_p_value,
)
from gengap_dist.statistics.paired import holm

UPDATES = "updates"
FEW_ARMS = 7  # fewer are too few to tell
RANK_VARIANCE = 1.06  # of Fisher's z for Spearman's r, times n - 3 (Fieller, Hartley & Pearson 1957, Biometrika 44:470)


def correlations(runs: Sequence[Run], trained: Mapping[str, Collection[int]] | None = None) -> list[Correlation]:
    """One for each measure that at least three arms have, and one for the number of updates; the strongest first.

    Seeds are repeats of one experiment, so the arms are the observations: x and y are an arm's means over seeds of the
    measure and of the score lost, and r is Spearman's. From seven arms on: Fisher's interval tanh(atanh r +- 1.96
    sqrt(1.06 / (A - 3))) and p, exact up to nine arms, for A arms. The partial correlation holds u, the number
    of updates, constant: (r_xy - r_xu r_yu) / sqrt((1 - r_xu^2) (1 - r_yu^2)), of ranks.

    Args:
        runs: with any status.
        trained: arm to the seeds whose runs trained; None: all that finished. An arm without one is left out.
    """
    finished = [
        run
        for run in runs
        if run.status == "finished" and run.score is not None and (trained is None or run.seed in trained[run.arm])
    ]
    names = list(dict.fromkeys(name for run in finished for name in run.measures))
    candidates = [_correlation(name, finished) for name in [*names, UPDATES]]
    out = [correlation for correlation in candidates if correlation]
    adjusted = holm([correlation.p for correlation in out])
    out = [correlation._replace(holm=p) for correlation, p in zip(out, adjusted, strict=True)]
    return sorted(out, key=lambda correlation: -abs(correlation.r))


def _correlation(name: str, runs: Sequence[Run]) -> Correlation | None:
    by_arm: dict[str, list[tuple[float, float, float]]] = {}
    for run in runs:
        if np.isfinite(value := _value(name, run)):
            by_arm.setdefault(run.arm, []).append((value, -(run.score or 0.0), float(run.num_updates)))
    num_arms = len(by_arm)
    if num_arms < 3:
        return None
    x, y, u = np.array([[fmean(column) for column in zip(*rows, strict=True)] for rows in by_arm.values()]).T
    r = spearman(x, y)
    if r is None:
        return None
    enough = num_arms >= FEW_ARMS
    known = name != UPDATES and min(u) > 0
    partial = partial_correlation(*(_centred_ranks(values) for values in (x, y, u))) if known else None
    return Correlation(
        measure=name,
        r=r,
        interval=fisher_interval(r, num_arms, variance=RANK_VARIANCE) if enough else None,
        leave_one_out=leave_one_out(x, y),
        partial=partial,
        partial_interval=None
        if partial is None or not enough
        else fisher_interval(partial, num_arms, num_controls=1, variance=RANK_VARIANCE),
        p=spearman_p_value(r, num_arms) if enough else None,
        holm=None,
        num_runs=sum(map(len, by_arm.values())),
        num_arms=num_arms,
    )


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    from scipy import stats  # slow to import, see statistics/paired.py

    positions = stats.rankdata(values)
    return positions - positions.mean()


def _value(name: str, run: Run) -> float:
    value = float(run.num_updates or "nan") if name == UPDATES else run.measures.get(name, float("nan"))
    if name == UPDATES or MetricKey.parse(name).known.has_log_scale:
        return float(np.log(value)) if value > 0 else float("nan")
    return value
