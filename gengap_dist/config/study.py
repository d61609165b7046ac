"""Settings of a study: arms, axes, seeds and tuning."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

from gengap_dist.config.file_names import file_name_problem
from gengap_dist.config.identity import FACTOR, LENGTHS, differing_settings, identifying_settings
from gengap_dist.config.loading import (
    field_names,
    flat,
    load_yaml,
    merge,
    nearest_setting,
    nested,
    renamed,
    resolve,
    validate,
)
from gengap_dist.config.numbers import Boolean, Integer, NonNegativeInt, Number, PositiveFloat, PositiveInt
from gengap_dist.config.sections import Affects, FrozenModel, RunConfig, Section
from gengap_dist.errors import UsageError, did_you_mean, first_of

MAX_ARMS = 10_000
BATCH_AND_LENGTH = (
    FACTOR, *LENGTHS, "train.length_unit", "train.num_evals", "optim.base_size",
    "optim.warmup_epochs",
)  # fmt: skip
"""What a plain arm may set: the batch, and what says how long it trains and warms up."""


def _number_or_auto(value: Any, check: Callable[[Any], int | Literal["auto"]]) -> int | Literal["auto"]:
    """null, which older files have, is auto; one error sentence in place of one for each member of the union."""
    try:
        return "auto" if value is None else check(value)
    except ValidationError:
        raise ValueError(
            f"study.concurrent ({value}) is not a positive integer and not auto: choose a number of runs, or auto"
        ) from None


def _arm_name(name: str) -> str:
    problem = file_name_problem(name)
    if not problem and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        problem = "has other characters than letters, digits and ._+-, or does not begin with a letter or digit"
    if problem:
        raise ValueError(
            f"study.arms, study.axes: the name of an arm ({name!r:.60}) {problem}: choose another, which can also be "
            "that of a folder"
        )
    return name


def _study_name(name: str) -> str:
    if problem := file_name_problem(name):
        raise ValueError(f"study.name ({name!r:.60}) {problem}: choose another, which can also be that of a folder")
    return name


class Arm(FrozenModel):
    """One arm of a study: a name, and its changes to the settings of the study."""

    name: Annotated[str, AfterValidator(_arm_name)]
    """Short name; also the name of its folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of this arm, nested or with dotted names: {batch.global_size: 512}."""


class Space(FrozenModel):
    """Search space of a tuned setting: a range from low to high, or a list of values."""

    low: Number | None = None
    """Smallest value."""
    high: Number | None = None
    """Largest value."""
    log: Boolean = False
    """Sample the logarithm uniformly."""
    values: tuple[Any, ...] = ()
    """The values to choose from, instead of low and high."""

    @model_validator(mode="after")
    def _check_range_or_values(self) -> Self:
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


class TuneSection(FrozenModel):
    """Tuning, with the same number of trials for every arm."""

    trials: Annotated[Integer, Field(ge=2, le=10_000)] = 16
    """Number of trials per arm; powers of two cover the space most evenly."""
    seed: NonNegativeInt = 1000
    """Seed of the sampled points and of the training in every trial; it must not be one of study.seeds."""
    space: Annotated[dict[str, Space], Field(min_length=1)]
    """Settings of optim and algorithm, each with {low, high} or {low, high, log: true} or {values: [...]}."""


class Match(FrozenModel):
    """One strength to find."""

    arm: str
    """Arm whose runs decide; the sign of its algorithm.rank_penalty stays."""
    to: str
    """Arm whose near-rank loss it must reach: one of study.match.between."""
    shared: tuple[str, ...] = ()
    """Arms that get the same strength, each with its own sign: the same penalty at another batch, and placebos."""


class MatchSection(FrozenModel):
    """Search of strengths of rank penalties by bisection, each on one seed, from near-rank loss alone."""

    seed: NonNegativeInt = 1000
    """Seed of the runs of the search; it must not be one of study.seeds."""
    arms: Annotated[tuple[Match, ...], Field(min_length=1)]
    """Strengths to find: a list of {arm, to, shared}."""
    between: tuple[str, str]
    """Two arms without a penalty, small batch and large batch: near-rank loss grows from the first to the second."""
    tolerance: PositiveFloat = 0.15
    """Largest distance from the target that is a match, as a fraction of that growth."""
    max_runs: Annotated[Integer, Field(ge=2)] = 8
    """Largest number of runs for each strength."""
    low: PositiveFloat = 1e-4
    """Smallest strength to try, without its sign."""
    high: PositiveFloat = 1.0
    """Largest strength to try, without its sign."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(
                f"study.match: low ({self.low:g}) to high ({self.high:g}) is not a range: choose high above low"
            )
        return self


class StudySection(Section, affects="result"):
    """Arms x seeds."""

    name: Annotated[str, AfterValidator(_study_name), Affects("observation")] = "study"
    """Title of the study, and the name of its default folder."""
    question: Annotated[str, Affects("observation")] = ""
    """The research question of the study; printed at the top of its report, with the answer."""
    tolerance: Annotated[Number | None, Field(gt=0), Affects("observation")] = None
    """Smallest difference of test results that counts, in the unit that is shown, percentage points for accuracy (null:
    0.5, or 0.5% of the baseline's mean for a metric that is no share)."""
    looks: Annotated[tuple[PositiveInt, ...], Affects("observation")] = ()
    """Numbers of seeds at which the study is judged, one or two, declared before the first: [10, 20] judges 10 seeds at
    a level of 1%, and all 20 at 4.3%, 4.9% in all (empty: once, at 5%)."""
    may_extend: Annotated[Boolean, Affects("observation")] = False
    """Seeds may be added at any later time: the first look then has a level of 4%, and all later ones together 1%, by
    e-values."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds; every arm runs with each of them, and arms are compared seed by seed."""
    baseline: Annotated[str, Affects("observation")] = ""
    """Name of the arm that the others are compared with. Empty: of the arms that set nothing but the batch and the
    length of training, the first with the smallest batch; a study without such an arm must name its baseline."""
    arms: tuple[Arm, ...] = ()
    """Explicit arms: a list of {name, set}."""
    axes: dict[str, Annotated[list[Any] | dict[str, dict[str, Any]], Field(min_length=1)]] = {}
    """Additional arms: every combination of one entry of each axis. An axis is a setting and its values, such as
    {batch.global_size: [128, 1024]}, or a name and named entries with settings, such as
    {algorithm: {plain: {}, sqrt: {optim.scaling: sqrt}}}. Names are joined: b128-plain, b128-sqrt, ...; an entry named
    "" adds nothing to the name. A combination that is the same run as an earlier arm is not repeated."""
    length_units: tuple[Literal["epochs", "updates"], ...] = ()
    """An additional axis: values of train.length_unit."""
    tune: TuneSection | None = None
    """Tune settings of every arm by validation accuracy before its seeds run: the same number of trials at the same
    points for each arm. Test images are not used."""
    match: MatchSection | None = None
    """Find the strengths of rank penalties before the seeds run, so that near-rank loss (centred, share below 0.01 s1,
    last hidden layer) of a penalised arm at the end is that of another arm. Accuracy is not used."""
    concurrent: Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto), Affects("runtime")] = "auto"
    """Number of runs at once, each on launch.num_processes ranks. auto: on one machine, ranks, threads and runs at once
    are chosen so that the study ends soonest, from a few measured steps of each arm; a run whose result depends on its
    ranks keeps launch.num_processes. On a Ray cluster auto runs as many as fit."""

    @property
    def num_at_once(self) -> int | None:
        """`concurrent` as a number; None for auto."""
        return None if self.concurrent == "auto" else self.concurrent


class StudyConfig(RunConfig, affects="result"):
    """A study: the settings of a run, and the changes of its arms."""

    study: StudySection

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        study = self.study
        if (num_arms := prod(map(len, study.axes.values()))) > MAX_ARMS:
            raise ValueError(f"study.axes give {num_arms:,} combinations: choose at most {MAX_ARMS:,}")
        names = [arm.name for arm in self.candidates]
        if not names:
            raise ValueError(
                "study.arms is empty, and so is study.axes: list at least one arm as {name: ..., set: {...}}"
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"study.arms and study.axes name {repeated[0]} more than once: give every arm and every entry of an "
                "axis its own name"
            )
        if len(set(study.seeds)) < len(study.seeds):
            raise ValueError(f"study.seeds ({list(study.seeds)}) holds a seed twice: list each once")
        looks = list(study.looks)
        if looks and (looks != sorted({*looks}) or len(looks) > 2 or looks[0] < 2):
            raise ValueError(
                f"study.looks ({looks}) are not one or two increasing numbers of seeds, at least 2: declare "
                "such as [10, 20], or study.may_extend=true for an extension without end"
            )
        if len(looks) == 2 and looks[1] < looks[0] + 2:
            raise ValueError(f"study.looks ({looks}): the second look adds fewer than two seeds: add more")
        if looks and study.may_extend:
            raise ValueError(
                f"study.looks ({looks}) and study.may_extend exclude each other: declare the looks, or an "
                "extension without end"
            )
        if study.baseline and study.baseline not in names:
            raise ValueError(
                f"study.baseline ({study.baseline}) is not an arm: choose one of {', '.join(names)}"
                + did_you_mean(study.baseline, names)
            )
        if study.tune:
            self._check_tuning(study.tune)
        if study.match:
            self._check_matching(study.match)
        return self

    def _check_tuning(self, tune: TuneSection) -> None:
        if tune.seed in self.study.seeds:
            raise ValueError(
                f"study.tune.seed ({tune.seed}) is one of study.seeds, and the seeds of tuning and of the compared "
                "runs must differ: choose another"
            )
        known = [name for name in field_names(RunConfig) if name.startswith(("optim.", "algorithm."))]
        for name in tune.space:
            if name not in known and (new := renamed(name)):
                raise ValueError(f"study.tune.space ({name}) is called {new} now: use that name")
            if name not in known:
                raise ValueError(
                    f"study.tune.space ({name}) is not a setting of optim or algorithm{nearest_setting(name, known)}: "
                    "put other settings into study.axes"
                )
        for arm in self.candidates:
            if both := sorted(flat(nested(arm.set)).keys() & tune.space.keys()):
                raise ValueError(f"study arm {arm.name} sets {both[0]}, which study.tune.space tunes: leave one out")

    def _check_matching(self, match: MatchSection) -> None:
        names = [arm.name for arm in self.candidates]
        if self.study.tune:
            raise ValueError("study.match and study.tune both set what an arm runs with: choose one")
        if match.seed in self.study.seeds:
            raise ValueError(
                f"study.match.seed ({match.seed}) is one of study.seeds, and strengths are found on a seed that judges "
                "nothing: choose another"
            )
        if not self.probe.enabled:
            raise ValueError("study.match needs near-rank loss, and probe.enabled is false: set it to true")
        found = [name for each in match.arms for name in (each.arm, *each.shared)]
        for name in (*found, *match.between, *(each.to for each in match.arms)):
            if name not in names:
                raise ValueError(
                    f"study.match names {name}, which is not an arm: choose one of {', '.join(names)}"
                    + did_you_mean(name, names)
                )
        if repeated := sorted({name for name in found if found.count(name) > 1}):
            raise ValueError(f"study.match names {repeated[0]} more than once: give every arm one strength")
        for name in found:
            if self._setting(name, "rank_penalty") is None:
                raise ValueError(
                    f"study.match names {name}, which has no algorithm.rank_penalty to find: set it in that arm; its "
                    "sign says whether the rank is raised or lowered"
                )
        for each in match.arms:
            if self._setting(each.arm, "rank_measure") == "placebo":
                raise ValueError(
                    f"study.match.arms ({each.arm}) has algorithm.rank_measure=placebo, which leaves near-rank loss "
                    "where it is: name it under shared"
                )
            if each.to not in match.between:
                raise ValueError(
                    f"study.match.arms ({each.arm}) is matched to {each.to}: choose one of study.match.between "
                    f"({', '.join(match.between)})"
                )
        for name in match.between:
            if self._setting(name, "rank_penalty") is not None:
                raise ValueError(
                    f"study.match.between ({name}) has an algorithm.rank_penalty itself: name two arms without one"
                )

    def _setting(self, arm: str, name: str) -> Any:
        """A setting of `algorithm` of an arm."""
        given = next(flat(nested(each.set)) for each in self.candidates if each.name == arm)
        return given.get(f"algorithm.{name}", getattr(self.algorithm, name))

    def strength_of(self, arm: str) -> float:
        """algorithm.rank_penalty of an arm; 0 without one."""
        return float(self._setting(arm, "rank_penalty") or 0.0)

    @cached_property
    def candidates(self) -> list[Arm]:
        """The explicit arms, then all combinations of the axes."""
        axes = self.study.axes | ({"train.length_unit": [*self.study.length_units]} if self.study.length_units else {})
        return [
            *self.study.arms,
            *(_combined(entries) for entries in product(*map(_entries, axes, axes.values())) if axes),
        ]

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """Combinations of the axes that are the same run as an earlier arm: their names to the name of that arm.

        Raises:
            UsageError: if an arm's overrides are not settings of a run.
        """
        first_names: dict[str, str] = {}
        duplicates: dict[str, str] = {}
        searches = self.study.match.arms if self.study.match else ()
        strength_of = {name: each.arm for each in searches for name in (each.arm, *each.shared)}  # not known yet
        for number, arm in enumerate(self.candidates):
            settings = identifying_settings(self.run_config(arm, seed=0))
            key = json.dumps([settings, strength_of.get(arm.name)])
            if key not in first_names:
                first_names[key] = arm.name
            elif number >= len(self.study.arms):
                duplicates[arm.name] = first_names[key]
        return duplicates

    @property
    def arms(self) -> list[Arm]:
        """All arms without the `duplicates`."""
        return [arm for arm in self.candidates if arm.name not in self.duplicates]

    @cached_property
    def baseline(self) -> str:
        """Name of the baseline arm: as study.baseline says, or the plain arm with the smallest batch.

        Raises:
            UsageError: if none is named, and no arm is plain; or if an arm's overrides are not settings of a run.
        """
        if self.study.baseline:
            return self.duplicates.get(self.study.baseline, self.study.baseline)
        by_size = sorted(self.arms, key=self._size)
        if plain := next((arm.name for arm in by_size if not self.treatment_of(arm)), None):
            return plain
        arm = by_size[0]
        raise UsageError(
            f"study.baseline is not given, and every arm sets more than its batch and its length ({arm.name} sets "
            f"{first_of(self.treatment_of(arm), 2)}): add an arm without that, or write baseline: {arm.name} in study:"
        )

    def _size(self, arm: Arm) -> int:
        return flat(nested(arm.set)).get("batch.global_size") or self.batch.global_size

    def treatment_of(self, arm: Arm) -> list[str]:
        """Names of the settings by which an arm differs from the study in more than its batch and its length.

        Raises:
            UsageError: if the arm's overrides are not settings of a run.
        """
        settings, of_study = flat(self.run_config(arm, seed=0)), flat(self.model_dump(exclude={"study"}, mode="json"))
        return sorted(differing_settings(settings, of_study | {name: settings[name] for name in BATCH_AND_LENGTH}))

    def run_config(self, arm: Arm, seed: int, tuned: Mapping[str, Any] | None = None) -> RunConfig:
        """The settings of one run of the study; `tuned` are the settings that tuning selected for its arm.

        Raises:
            UsageError: if the arm's overrides are not settings of a run.
        """
        base = self.model_dump(mode="json", exclude={"study"})
        try:
            if "seed" in arm.set:
                raise UsageError("seed cannot be set by an arm: list the seeds in study.seeds")
            config = validate(
                RunConfig, merge(merge(merge(base, nested(arm.set)), nested(tuned or {})), {"seed": seed})
            )
            if self.study.tune and not config.data.val_fraction:
                raise UsageError("study.tune needs validation images, and data.val_fraction is 0: set it above 0")
        except UsageError as error:
            raise UsageError(f"study arm {arm.name}: {error}") from None
        return config


def resolve_run_or_study(files: Sequence[Path], overrides: Mapping[str, Any]) -> RunConfig | StudyConfig:
    """The settings of a study if a file or the command line has the section study, else those of a run.

    Raises:
        UsageError: see `loading.resolve`.
    """
    is_study = "study" in overrides or any("study" in load_yaml(file) for file in files)
    return resolve(StudyConfig if is_study else RunConfig, [*files], overrides)


def _entries(axis: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each entry of an axis.

    >>> _entries("batch.global_size", [128]), _entries("optim.lr", [0.1]), _entries("algorithm", {"plain": {}})
    ([('b128', {'batch.global_size': 128})], [('lr0.1', {'optim.lr': 0.1})], [('plain', {})])
    >>> [label for label, _ in _entries("optim.scaling", ["none", "sqrt"])], _entries("train.length_unit", ["updates"])
    (['scaling-none', 'scaling-sqrt'], [('updates', {'train.length_unit': 'updates'})])
    """
    if isinstance(values, dict):
        return [*values.items()]
    prefix = {"batch.global_size": "b", "train.length_unit": ""}.get(axis, axis.rpartition(".")[2])

    def label(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = re.sub(r"[^A-Za-z0-9.+-]+", ".", json.dumps(value).strip('"[]{}'))
        return f"{prefix}{text}" if number or not prefix else f"{prefix}-{text}"

    return [(label(value), {axis: value}) for value in values]


def _combined(entries: Iterable[tuple[str, dict[str, Any]]]) -> Arm:
    """One entry of each axis as an arm; if two axes set the same setting, the later axis is used."""
    settings: dict[str, Any] = {}
    for _, change in entries:
        settings = merge(settings, nested(change))
    return validate(Arm, {"name": "-".join(label for label, _ in entries if label) or "plain", "set": settings})
