"""Settings of a study: arms, axes, seeds and tuning."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from gengap_dist.config.loading import field_names, flat, merge, nested, renamed, validate
from gengap_dist.config.sections import RunConfig, Section
from gengap_dist.errors import UsageError, did_you_mean


class Arm(Section):
    """One column of a study: a name, and what differs from the base."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    """Short name; it becomes a folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of this arm, nested or dotted: {batch.global_size: 512}."""


class Space(Section):
    """Where a tuned setting is looked for: from low to high, or among values."""

    low: FiniteFloat | None = None
    """Smallest value."""
    high: FiniteFloat | None = None
    """Largest value."""
    log: bool = False
    """Look evenly among orders of magnitude."""
    values: tuple[Any, ...] = ()
    """The values to choose from, instead of low and high."""

    @model_validator(mode="after")
    def _a_range_or_values(self) -> Self:
        low, high = self.low, self.high
        if self.values and (low, high, self.log) == (None, None, False):
            if len(self.values) < 2:
                raise ValueError(f"study.tune.space: values ({list(self.values)}) leave no choice: list at least two")
            return self
        if self.values or low is None or high is None:
            raise ValueError("study.tune.space: a setting needs either low and high (and log), or values: give one")
        if not low < high or (self.log and low <= 0):
            rule = "low above 0 for log, and " if self.log else ""
            raise ValueError(
                f"study.tune.space: low ({low:g}) to high ({high:g}) is not a range: choose {rule}high above low"
            )
        return self


class TuneSection(Section):
    """Tuning, with the same trials for every arm."""

    trials: Annotated[int, Field(ge=2)] = 16
    """Trials of every arm; powers of two fill the space most evenly."""
    seed: NonNegativeInt = 1000
    """Seed of the points that are tried, and of every trial's own training; none of study.seeds."""
    space: Annotated[dict[str, Space], Field(min_length=1)]
    """Settings of optim and algorithm to {low, high} or {low, high, log: true} or {values: [...]}."""


class StudySection(Section):
    """Arms x seeds."""

    name: str = "study"
    """Title of the study."""
    question: str = ""
    """What the study is meant to answer; printed at the head of its report."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds; every arm is run with each, and arms are compared seed by seed."""
    baseline: str = ""
    """Name of the arm the others are compared with (empty: that of the smallest batch, of several the first)."""
    arms: tuple[Arm, ...] = ()
    """Arms one by one: a list of {name, set}."""
    axes: dict[str, Annotated[list[Any] | dict[str, dict[str, Any]], Field(min_length=1)]] = {}
    """More arms: every combination of one entry of each axis. An axis is a setting and its values, such as
    {batch.global_size: [128, 1024]}, or has entries with names and settings of their own, such as
    {algorithm: {plain: {}, sqrt: {optim.scaling: sqrt}}}. Names are joined: b128-plain, b128-sqrt, ...; an entry named
    "" adds nothing to them. A combination that would be the same run as an earlier arm is that arm."""
    length_units: tuple[Literal["epochs", "updates"], ...] = ()
    """One more axis: values of train.length_unit."""
    tune: TuneSection | None = None
    """Find settings for every arm by validation before its seeds are run: as many trials, at the same points, for each
    arm. The test images play no part in the choice."""
    concurrent: PositiveInt | None = None
    """ray: most runs at a time; null: as many as the cluster has room for."""


class StudyConfig(RunConfig):
    """A study: the settings of a run, and what varies over its arms."""

    study: StudySection

    @model_validator(mode="after")
    def _arms_are_runs(self) -> Self:
        study = self.study
        names = [arm.name for arm in self.candidates]
        if not names:
            raise ValueError(
                "study.arms is empty, and so is study.axes: list at least one arm as {name: ..., set: {...}}"
            )
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(
                f"study.arms and study.axes name {doubled[0]} more than once: give every arm and every entry of an "
                "axis its own name"
            )
        if len(set(study.seeds)) < len(study.seeds):
            raise ValueError(f"study.seeds ({list(study.seeds)}) holds a seed twice: list each once")
        if study.baseline and study.baseline not in names:
            raise ValueError(
                f"study.baseline ({study.baseline}) is not an arm: choose one of {', '.join(names)}"
                + did_you_mean(study.baseline, names)
            )
        if study.tune:
            self._check_tuning(study.tune)
        return self

    def _check_tuning(self, tune: TuneSection) -> None:
        if tune.seed in self.study.seeds:
            raise ValueError(
                f"study.tune.seed ({tune.seed}) is one of study.seeds, and no arm is to be judged by a run it was "
                "tuned on: choose another"
            )
        known = [name for name in field_names(RunConfig) if name.startswith(("optim.", "algorithm."))]
        for name in tune.space:
            if name not in known and (new := renamed(name)):
                raise ValueError(f"study.tune.space ({name}) is called {new} now: use that name")
            if name not in known:
                raise ValueError(
                    f"study.tune.space ({name}) is not a setting of optim or algorithm{did_you_mean(name, known)}: "
                    "the others are the question or the budget, put them into study.axes"
                )
        for arm in self.candidates:
            if both := sorted(flat(nested(arm.set)).keys() & tune.space.keys()):
                raise ValueError(f"study arm {arm.name} sets {both[0]}, which study.tune.space tunes: leave one out")

    @cached_property
    def candidates(self) -> list[Arm]:
        """The arms that are listed, then all combinations of the axes."""
        axes = self.study.axes | ({"train.length_unit": [*self.study.length_units]} if self.study.length_units else {})
        return [
            *self.study.arms,
            *(_combined(entries) for entries in product(*map(_entries, axes, axes.values())) if axes),
        ]

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """Combinations of the axes that would be the same run as an earlier arm, and that arm.

        Raises:
            UsageError: if an arm's overrides are not settings of a run.
        """
        first: dict[str, str] = {}
        twins: dict[str, str] = {}
        for number, arm in enumerate(self.candidates):
            what = json.dumps(_essence(self.run_config(arm, seed=0)))
            if what not in first:
                first[what] = arm.name
            elif number >= len(self.study.arms):
                twins[arm.name] = first[what]
        return twins

    @property
    def arms(self) -> list[Arm]:
        """All arms, each once; see `twins`."""
        return [arm for arm in self.candidates if arm.name not in self.duplicates]

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        sizes = {arm.name: flat(nested(arm.set)).get("batch.global_size", 0) for arm in self.candidates}
        name = self.study.baseline or min(sizes, key=lambda name: sizes[name] or self.batch.global_size)
        return self.duplicates.get(name, name)

    def run_config(self, arm: Arm, seed: int, tuned: Mapping[str, Any] | None = None) -> RunConfig:
        """The settings of one run of the study; `tuned` are settings found for its arm.

        Raises:
            UsageError: if the arm's overrides are not settings of a run.
        """
        base = self.model_dump(mode="json", exclude={"study"})
        try:
            if "seed" in arm.set:
                raise UsageError("seed is not an arm's to set: list the seeds in study.seeds")
            config = validate(
                RunConfig, merge(merge(merge(base, nested(arm.set)), nested(tuned or {})), {"seed": seed})
            )
            if self.study.tune and not config.data.val_fraction:
                raise UsageError("study.tune chooses by validation accuracy, and data.val_fraction is 0: hold some out")
        except UsageError as error:
            raise UsageError(f"study arm {arm.name}: {error}") from None
        return config


def _entries(axis: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Labels and settings of an axis.

    >>> _entries("batch.global_size", [128]), _entries("optim.lr", [0.1]), _entries("algorithm", {"plain": {}})
    ([('b128', {'batch.global_size': 128})], [('lr0.1', {'optim.lr': 0.1})], [('plain', {})])
    >>> [label for label, _ in _entries("optim.scaling", ["none", "sqrt"])], _entries("train.length_unit", ["updates"])
    (['scaling-none', 'scaling-sqrt'], [('updates', {'train.length_unit': 'updates'})])
    """
    if isinstance(values, dict):
        return [*values.items()]
    start = {"batch.global_size": "b", "train.length_unit": ""}.get(axis, axis.rpartition(".")[2])

    def label(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = re.sub(r"[^A-Za-z0-9.+-]+", ".", json.dumps(value).strip('"[]{}'))
        return f"{start}{text}" if number or not start else f"{start}-{text}"

    return [(label(value), {axis: value}) for value in values]


def _combined(entries: Iterable[tuple[str, dict[str, Any]]]) -> Arm:
    """One entry of each axis as an arm; where two set the same, the later axis wins."""
    settings: dict[str, Any] = {}
    for _, change in entries:
        settings = merge(settings, nested(change))
    return validate(Arm, {"name": "-".join(label for label, _ in entries if label) or "plain", "set": settings})


def _essence(config: RunConfig) -> dict[str, Any]:
    """What a run computes: equal for two configs that differ only in words.

    >>> small = {"batch": {"global_size": 8}, "optim": {"base_size": 8}}
    >>> a, b = ({"optim": {"base_size": 8, "scaling": rule}} for rule in ("none", "sqrt"))
    >>> _essence(validate(RunConfig, merge(small, a))) == _essence(validate(RunConfig, merge(small, b)))
    True
    """
    found = {name: value for name, value in flat(config).items() if not name.startswith(("mlflow.", "checkpoint."))}
    if (
        config.batch.global_size == config.optim.base_size and config.algorithm.local_sgd is None
    ):  # k = 1: no rule scales
        found |= {"optim.scaling": "none", "train.length_unit": "epochs"}
    if (found["optim.scaling"], found["train.length_unit"]) == ("none", "epochs"):
        del found["optim.base_size"]
    return found
