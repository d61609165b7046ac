"""Tuning with equal effort for all arms: the same points, fixed before the first trial, scored on validation data.

Points come from a quasi-random sequence, as in Shallue et al. 2019 and Nado et al. 2021: no trial depends on another's
outcome, so trials may run concurrently and in any order, and an interrupted search continues where it stopped.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.study import TuneSection
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import RunStatus

Point = dict[str, Any]
"""Maps dotted settings to values."""


class Trial(NamedTuple):
    """One trial of an arm; without results if it is not finished."""

    point: Point
    status: str
    accuracy: float | None = None
    """Validation accuracy at the end."""
    updates: int | None = None
    """Updates to train.target_accuracy; None if it was not reached, or no target is set."""


def points(tune: TuneSection) -> list[Point]:
    """The points of a scrambled Sobol sequence, as settings: fixed by study.tune alone.

    >>> tune = TuneSection.model_validate({"trials": 4, "space": {"optim.momentum": {"values": [0.5, 0.9]}}})
    >>> sorted(point["optim.momentum"] for point in points(tune))
    [0.5, 0.5, 0.9, 0.9]
    """
    import optuna  # slow, and only this function needs it

    space = {
        name: optuna.distributions.FloatDistribution(0.0, len(entry.values))
        if entry.low is None or entry.high is None
        else optuna.distributions.FloatDistribution(entry.low, entry.high, log=entry.log)
        for name, entry in tune.space.items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        search = optuna.create_study(sampler=optuna.samplers.QMCSampler(scramble=True, seed=tune.seed))
    # the sampler takes the space from a finished trial; without one it would draw at random
    corner = {name: distribution.low for name, distribution in space.items()}
    search.add_trial(optuna.create_trial(params=corner, distributions={**space}, value=0.0))
    drawn = [search.ask({**space}).params for _ in range(tune.trials)]
    return [{name: _value(tune, name, x) for name, x in point.items()} for point in drawn]


def _value(tune: TuneSection, name: str, drawn: float) -> Any:
    """The drawn number with four digits, or for a list of values the entry at that position."""
    values = tune.space[name].values
    return values[min(int(drawn), len(values) - 1)] if values else float(f"{drawn:.4g}")


def read_trial(point: Point, folder: Path) -> Trial:
    """Read a trial from its folder; the status is "" if it has not started."""
    if not (folder / "run.json").exists():
        return Trial(point, "")
    info = run_folder.read_info(folder)
    if info.status != RunStatus.FINISHED:
        return Trial(point, info.status)
    accuracies = [line["val/accuracy"] for line in run_folder.read_metrics(folder) if "val/accuracy" in line]
    return Trial(point, info.status, accuracies[-1], info.result.get("updates_to_target"))


def best(trials: Sequence[Trial], *, to_target: bool) -> Trial | None:
    """The finished trial with the highest validation accuracy, or with the fewest updates to the target.

    Ties, and trials that did not reach the target, are decided by accuracy, then by the order of the trials. None if no
    trial finished.

    >>> one, two = Trial({"lr": 1}, "finished", 0.9, 70), Trial({"lr": 2}, "finished", 0.8, 50)
    >>> lost = Trial({"lr": 3}, "diverged")
    >>> best([lost, one, two], to_target=False) is one, best([lost, one, two], to_target=True) is two
    (True, True)
    >>> best([lost], to_target=False)
    """

    def score(trial: Trial) -> tuple[float, float]:
        updates = trial.updates if to_target and trial.updates is not None else float("inf")
        return -updates, trial.accuracy or 0.0

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
        "trials": [{"setting": t.point, "status": t.status, "score": t.accuracy, "updates": t.updates} for t in trials],
        "best": chosen.point if chosen else None,
        "edge": edges(tune, trials, chosen.point) if chosen else [],
    }
