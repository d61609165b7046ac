"""The runs of a study, and the tuning trials before them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.training.run_cost import ArmFacts


class PlannedRun(NamedTuple):
    """One run of a study."""

    arm: str
    label: str
    """Name within the arm: `seed 0`, `trial 3`."""
    config: RunConfig
    folder: Path

    @property
    def title(self) -> str:
        """Name shown in messages."""
        return f"{self.arm} {self.label}"


def planned_runs(config: StudyConfig, out: Path, tuned: Mapping[str, Mapping[str, Any]]) -> list[PlannedRun]:
    """Every arm with every seed; all arms of one seed come before the next seed, so that pairs are complete early.

    Args:
        config: the study.
        out: its folder.
        tuned: arm to its tuned settings; with study.tune, an arm without tuned settings has no runs.

    Raises:
        UsageError: if an arm's overrides are not valid settings of a run.
    """
    arms = [arm for arm in config.arms if not config.study.tune or arm.name in tuned]
    return [
        PlannedRun(
            arm.name,
            f"seed {seed}",
            config.run_config(arm, seed, tuned.get(arm.name)),
            out / "runs" / arm.name / f"seed{seed}",
        )
        for seed in config.study.seeds
        for arm in arms
    ]


def planned_trials(config: StudyConfig, out: Path, points: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """A trial of every arm at every point, without probes; all arms at one point come before the next point.

    Raises:
        UsageError: if a point's settings are not valid with an arm's.
    """
    assert config.study.tune is not None
    seed, no_probe = config.study.tune.seed, {"probe.enabled": False}
    return [
        PlannedRun(
            arm.name,
            f"trial {number}",
            config.run_config(arm, seed, {**point, **no_probe}),
            out / "tune" / arm.name / f"trial{number:03d}",
        )
        for number, point in enumerate(points)
        for arm in config.arms
    ]


def first_configs(plan: Iterable[PlannedRun]) -> dict[str, RunConfig]:
    """The settings of the first run of each arm, by its name."""
    configs: dict[str, RunConfig] = {}
    for planned in plan:
        configs.setdefault(planned.arm, planned.config)
    return configs


class Forecast(NamedTuple):
    """What the runs of a study will take, from what was measured of them."""

    seconds: float | None
    """Until all runs have ended; None if a cost is not known."""
    memory_bytes: Mapping[str, int]
    """Of the ranks of a run in its smallest layout, by arm, as far as it is known."""


class StudyCallback:
    """Called on every step and at the end of every run; the methods of this class do nothing."""

    def on_checked(self, facts: Mapping[str, ArmFacts]) -> None:
        """All arms were checked against data and networks, and no run has started yet; facts by arm."""

    def on_forecast(self, forecast: Forecast) -> None:
        """The costs of the runs are known as far as they are measured before the first of them."""

    def on_step(self, planned_run: PlannedRun, done: int, total: int, note: str) -> None:
        """`done` of `total` steps of a run are complete; `note` is a short status."""

    def on_core_wait(self, planned_run: PlannedRun, sentence: str) -> None:
        """A run on this machine waits for a core more than half of its time; at most once for each run."""

    def on_run_end(self, planned_run: PlannedRun, note: str) -> None:
        """A run has ended: a status of run.json, "already there", or why it failed."""

    def on_measure(self, done: int, total: int) -> None:
        """`done` of `total` costs are measured, before the runs start."""

    def on_time_left(self, seconds: float) -> None:
        """Forecast of the seconds until all runs have ended."""


class PassOn(StudyCallback):
    """Passes every call on; subclasses do something beside."""

    def __init__(self, inner: StudyCallback) -> None:
        """Calls `inner`."""
        self.inner = inner

    def on_checked(self, facts: Mapping[str, ArmFacts]) -> None:
        """See `StudyCallback`."""
        self.inner.on_checked(facts)

    def on_forecast(self, forecast: Forecast) -> None:
        """See `StudyCallback`."""
        self.inner.on_forecast(forecast)

    def on_step(self, planned_run: PlannedRun, done: int, total: int, note: str) -> None:
        """See `StudyCallback`."""
        self.inner.on_step(planned_run, done, total, note)

    def on_core_wait(self, planned_run: PlannedRun, sentence: str) -> None:
        """See `StudyCallback`."""
        self.inner.on_core_wait(planned_run, sentence)

    def on_run_end(self, planned_run: PlannedRun, note: str) -> None:
        """See `StudyCallback`."""
        self.inner.on_run_end(planned_run, note)

    def on_measure(self, done: int, total: int) -> None:
        """See `StudyCallback`."""
        self.inner.on_measure(done, total)

    def on_time_left(self, seconds: float) -> None:
        """See `StudyCallback`."""
        self.inner.on_time_left(seconds)
