"""Tuning with equal effort for all arms: the same points, fixed before the first trial, scored on validation data.

Points come from a quasi-random sequence, as in Shallue et al. 2019 and Nado et al. 2021: no trial depends on another's
outcome, so trials may run concurrently and in any order, and an interrupted search continues where it stopped.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.study import Space, TuneSection
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import RunStatus

Point = dict[str, Any]
"""Maps dotted settings to values."""


class Trial(NamedTuple):
    """One trial of an arm; without results if it is not finished."""

    point: Point
    status: str
    score: float | None = None
    """`MetricDescription.score` on the validation samples at the end."""
    updates: int | None = None
    """Updates to the target; None if it was not reached, or none is set."""


def points(tune: TuneSection) -> list[Point]:
    """The points of a scrambled Sobol sequence, as settings: fixed by study.tune alone.

    >>> tune = TuneSection.model_validate({"trials": 4, "space": {"optim.momentum": {"values": [0.5, 0.9]}}})
    >>> sorted(point["optim.momentum"] for point in points(tune))
    [0.5, 0.5, 0.9, 0.9]
    """
    from scipy.stats import qmc  # takes more than a second, and only this function needs it

    # `rng=` would give other points than those of studies that exist
    unit_cube = qmc.Sobol(len(tune.space), scramble=True, seed=tune.seed)  # pyright: ignore[reportCallIssue]
    drawn = unit_cube.random_base2((tune.trials - 1).bit_length())[: tune.trials]  # [trials, settings], in [0, 1)
    return [{name: _value(tune.space[name], u) for name, u in zip(tune.space, row, strict=True)} for row in drawn]


def _value(space: Space, u: float) -> Any:
    """The setting at u in [0, 1) of its space: a number with four digits, or one of the listed values.

    >>> [_value(each, 0.5) for each in (Space(low=1, high=2), Space(low=0.01, high=1, log=True), Space(values=(3, 4)))]
    [1.5, 0.1, 4]
    """
    low, high = space.low, space.high
    if low is None or high is None:
        return space.values[int(u * len(space.values))]
    number = low * (high / low) ** u if space.log else low + (high - low) * u
    return float(f"{number:.4g}")


def read_trial(point: Point, folder: Path) -> Trial:
    """Read a trial from its folder; the status is "" if it has not started."""
    if not (folder / "run.json").exists():
        return Trial(point, "")
    info = run_folder.read_info(folder)
    if info.status != RunStatus.FINISHED:
        return Trial(point, info.status)
    name = f"val/{info.metric.name}"
    values = [line[name] for line in run_folder.read_metrics(folder) if name in line]
    return Trial(point, info.status, info.metric.score(values[-1]), info.result.get("updates_to_target"))


def best(trials: Sequence[Trial], *, to_target: bool) -> Trial | None:
    """The finished trial with the highest validation score, or with the fewest updates to the target.

    Ties, and trials that did not reach the target, are decided by that score, then by the order of the trials. None
    if no trial finished.

    >>> one, two = Trial({"lr": 1}, "finished", 0.9, 70), Trial({"lr": 2}, "finished", 0.8, 50)
    >>> lost = Trial({"lr": 3}, "diverged")
    >>> best([lost, one, two], to_target=False) is one, best([lost, one, two], to_target=True) is two
    (True, True)
    >>> best([lost], to_target=False)
    """

    def score(trial: Trial) -> tuple[float, float]:
        updates = trial.updates if to_target and trial.updates is not None else float("inf")
        return -updates, -math.inf if trial.score is None else trial.score

    return max((trial for trial in trials if trial.status == RunStatus.FINISHED), key=score, default=None)


def edges(tune: TuneSection, trials: Sequence[Trial], chosen: Point) -> list[str]:
    """Settings whose chosen value is the lowest or highest one tried, as text: the optimum may be outside.

    Settings with fewer than three tried numbers are left out: each of two numbers is at an end.

    >>> tune = TuneSection.model_validate({"space": {"optim.lr": {"low": 0.1, "high": 1}}})
    >>> trials = [Trial({"optim.lr": lr}, "finished", 0.5) for lr in (0.12, 0.5, 0.9)]
    >>> edges(tune, trials, {"optim.lr": 0.12}), edges(tune, trials, {"optim.lr": 0.5})
    (['optim.lr at its low end (0.12, of 0.1 to 1)'], [])
    """
    at_edge = []
    for name, space in tune.space.items():
        tried = sorted({trial.point[name] for trial in trials if _is_number(trial.point[name])})
        if len(tried) < 3 or chosen[name] not in (tried[0], tried[-1]):
            continue
        low, high = (tried[0], tried[-1]) if space.values else (space.low, space.high)
        end = "low" if chosen[name] == tried[0] else "high"
        at_edge.append(f"{name} at its {end} end ({chosen[name]:g}, of {low:g} to {high:g})")
    return at_edge


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def summary(tune: TuneSection, trials: Sequence[Trial], *, to_target: bool) -> Mapping[str, Any]:
    """The trials of one arm and the best setting, for study.json."""
    chosen = best(trials, to_target=to_target)
    return {
        "trials": [{"setting": t.point, "status": t.status, "score": t.score, "updates": t.updates} for t in trials],
        "best": chosen.point if chosen else None,
        "edge": edges(tune, trials, chosen.point) if chosen else [],
    }
