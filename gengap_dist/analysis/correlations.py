"""Correlation of each measure with the score lost: over runs, seeds removed, updates held constant.

Correlation is not cause: these numbers decide no claim (see `claims`).
"""

from collections.abc import Sequence

import numpy as np

from gengap_dist.analysis.results import Correlation, Run
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.statistics.correlation import (
    fisher_interval,
    p_value_of_r,
    partial_correlation,
    pearson,
    subtract_group_mean,
)
from gengap_dist.statistics.paired import holm

UPDATES = "updates"


def correlations(runs: Sequence[Run]) -> list[Correlation]:
    """One for each measure that at least three arms have, and one for the number of updates; the strongest first.

    For run i of seed s, x and y are the measure and the score lost, each less its mean over the runs of seed s; r is
    Pearson's of all (x, y). Runs of one arm are repeats of one experiment, so intervals and p count arms: Fisher's
    tanh(atanh r +- 1.96 / sqrt(A - 3 - k)), and t = r sqrt((A - 2 - k) / (1 - r^2)) with A - 2 - k degrees of freedom,
    for A arms and k variables held constant. The partial correlation holds u, the logarithm of the updates, constant:
    (r_xy - r_xu r_yu) / sqrt((1 - r_xu^2) (1 - r_yu^2)).
    """
    finished = [run for run in runs if run.status == "finished" and run.score is not None]
    names = list(dict.fromkeys(name for run in finished for name in run.measures))
    candidates = [_correlation(name, finished) for name in [*names, UPDATES]]
    out = [correlation for correlation in candidates if correlation]
    adjusted = holm([correlation.p for correlation in out])
    out = [correlation._replace(holm=p) for correlation, p in zip(out, adjusted, strict=True)]
    return sorted(out, key=lambda correlation: -abs(correlation.r))


def _correlation(name: str, runs: Sequence[Run]) -> Correlation | None:
    measured = [(run, value) for run in runs if np.isfinite(value := _value(name, run))]
    num_arms = len({run.arm for run, _ in measured})
    if num_arms < 3:
        return None
    seeds = [run.seed for run, _ in measured]
    x = subtract_group_mean(np.array([value for _, value in measured]), seeds)
    y = subtract_group_mean(np.array([-(run.score or 0.0) for run, _ in measured]), seeds)
    u = subtract_group_mean(np.log([max(1, run.num_updates) for run, _ in measured]), seeds)
    r = pearson(x, y)
    if r is None:
        return None
    known = all(run.num_updates for run, _ in measured)
    partial = partial_correlation(x, y, u) if known and name != UPDATES else None
    return Correlation(
        measure=name,
        r=r,
        interval=fisher_interval(r, num_arms),
        partial=partial,
        partial_interval=None if partial is None else fisher_interval(partial, num_arms, num_controls=1),
        p=p_value_of_r(r, num_arms),
        holm=None,
        num_runs=len(measured),
        num_arms=num_arms,
    )


def _value(name: str, run: Run) -> float:
    value = float(run.num_updates or "nan") if name == UPDATES else run.measures.get(name, float("nan"))
    if name == UPDATES or MetricKey.parse(name).known.has_log_scale:
        return float(np.log(value)) if value > 0 else float("nan")
    return value
