"""How explanations go with the accuracy that runs lose: over runs, seeds removed, updates held constant.

Correlation is not cause: what is said here never decides a claim alone (see `verdict`).
"""

from collections.abc import Sequence

import numpy as np

from gengap_dist.comparison import Correlation, Interval, Run
from gengap_dist.comparison.pairing import CONFIDENCE, holm

POSITIVE = ("noise_scale", "hessian/", "keskar_sharpness", "nc1", "updates")  # differ by factors: taken as logarithms
UPDATES = "updates"


def correlations(runs: Sequence[Run]) -> list[Correlation]:
    """One for each measure that at least three arms have, and one for the number of updates; the strongest first.

    For run i of seed s, x and y are the measure and the accuracy lost, each less its mean over the runs of seed s; r is
    Pearson's of all (x, y). Runs of one arm are repeats of one experiment, so intervals and p count arms: Fisher's
    tanh(atanh r +- 1.96 / sqrt(A - 3 - k)), and t = r sqrt((A - 2 - k) / (1 - r^2)) with A - 2 - k degrees of freedom,
    for A arms and k variables held constant. The partial correlation holds u, the logarithm of the updates, constant:
    (r_xy - r_xu r_yu) / sqrt((1 - r_xu^2) (1 - r_yu^2)).
    """
    done = [run for run in runs if run.status == "finished" and run.accuracy is not None]
    names = list(dict.fromkeys(name for run in done for name in run.measures))
    found = [_correlation(name, done) for name in [*names, UPDATES]]
    out = [correlation for correlation in found if correlation]
    adjusted = holm([correlation.p for correlation in out])
    out = [correlation._replace(holm=p) for correlation, p in zip(out, adjusted, strict=True)]
    return sorted(out, key=lambda correlation: -abs(correlation.r))


def _correlation(name: str, runs: Sequence[Run]) -> Correlation | None:
    having = [(run, value) for run in runs if np.isfinite(value := _value(name, run))]
    num_arms = len({run.arm for run, _ in having})
    if num_arms < 3:
        return None
    seeds = [run.seed for run, _ in having]
    x = _less_mean(np.array([value for _, value in having]), seeds)
    y = _less_mean(np.array([-(run.accuracy or 0.0) for run, _ in having]), seeds)
    u = _less_mean(np.log([max(1, run.num_updates) for run, _ in having]), seeds)
    r = pearson(x, y)
    if r is None:
        return None
    known = all(run.num_updates for run, _ in having)
    partial = partial_correlation(x, y, u) if known and name != UPDATES else None
    return Correlation(
        measure=name,
        r=r,
        interval=fisher(r, num_arms),
        partial=partial,
        partial_interval=None if partial is None else fisher(partial, num_arms, held=1),
        p=_p(r, num_arms),
        holm=None,
        num_runs=len(having),
        num_arms=num_arms,
    )


def _value(name: str, run: Run) -> float:
    value = float(run.num_updates or "nan") if name == UPDATES else run.measures.get(name, float("nan"))
    if name.startswith(POSITIVE):
        return float(np.log(value)) if value > 0 else float("nan")
    return value


def _less_mean(values: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    groups = np.array(seeds)
    out = values.astype(float)
    for seed in set(seeds):
        out[groups == seed] -= out[groups == seed].mean()
    return out


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Sum x y / sqrt(sum x^2 sum y^2) of two centred variables [n]; None if one does not vary.

    >>> round(pearson(np.array([-1.0, 0.0, 1.0]), np.array([-1.0, -1.0, 2.0])), 6)
    0.866025
    """
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if not scale > 1e-12:
        return None
    return float(np.clip(x @ y / scale, -1.0, 1.0))


def partial_correlation(x: np.ndarray, y: np.ndarray, u: np.ndarray) -> float | None:
    """Of x and y [n] with u held constant, all centred; None if u leaves nothing of one of them, or does not vary.

    >>> x, y, u = np.array([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
    >>> round(pearson(x + u, y + u), 6), abs(round(partial_correlation(x + u, y + u, u), 6))  # together only by u
    (0.5, 0.0)
    """
    xy, xu, yu = pearson(x, y), pearson(x, u), pearson(y, u)
    if xy is None or xu is None or yu is None:
        return None
    left = (1 - xu**2) * (1 - yu**2)
    if left < 1e-9:
        return None
    return float(np.clip((xy - xu * yu) / left**0.5, -1.0, 1.0))


def fisher(r: float, num: int, held: int = 0) -> Interval | None:
    """95% interval of a correlation of `num` independent observations, `held` variables held constant.

    >>> [round(end, 3) for end in fisher(0.5, 28)]
    [0.156, 0.736]
    >>> fisher(0.5, 3)
    """
    if num - 3 - held < 1:
        return None
    from scipy import stats  # slow, see pairing

    half = stats.norm.ppf((1 + CONFIDENCE) / 2) / (num - 3 - held) ** 0.5
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return (float(np.tanh(z - half)), float(np.tanh(z + half)))


def _p(r: float, num: int) -> float | None:
    df = num - 2
    if df < 1:
        return None
    from scipy import stats

    t = abs(r) * (df / max(1 - r**2, 1e-15)) ** 0.5
    return float(2 * stats.t.sf(t, df))
