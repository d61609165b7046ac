"""A study as the rules see it: the runs that trained, the pairs that are missing, and what counts as a difference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

from gengap_dist.analysis.arm_roles import Arm, Roles
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.analysis.rules.training import Training
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Interval, differences

NEAR_RANK_MARGIN = 0.02  # of near-rank loss, a share: two singular values in a hundred
MAX_MISSING = 6  # pairs whose values may be anything; with more of them nothing can be told

Value = TypeVar("Value")
Outcomes = Mapping[int, float]
"""Seed to a quantity of a run, or to a difference of two."""


class JudgedStudy(NamedTuple):
    """What every rule needs. Scores are shares for accuracy, and larger is better for all metrics."""

    metric: MetricDescription
    margin: float
    """`study.tolerance` as a difference of scores: a smaller one does not count."""
    look: Look
    base: Arm
    arms: Mapping[str, Arm]
    """All arms, with their finished runs."""
    roles: Roles
    training: Mapping[str, Training]
    """By arm."""

    def trained(self, arm: Arm) -> Arm:
        """The arm with those of its runs that trained."""
        kept = self.training[arm.name].trained
        return arm._replace(runs={seed: run for seed, run in arm.runs.items() if seed in kept})

    def missing(self, arms: Sequence[Arm], groups: Sequence[Mapping[int, object]]) -> list[int]:
        """Seeds that one of these arms has, with any status, and that have no value in one of the groups."""
        every = set().union(*(self.training[arm.name].seeds for arm in arms))
        return sorted(seed for seed in every if not all(seed in values for values in groups))

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest possible score; None if there are none."""
        if self.metric.unit != "share":
            return None
        low, high = sorted((self.metric.score(0.0), self.metric.score(1.0)))
        return (low, high)

    def scores(self, arm: Arm) -> dict[int, float]:
        """Seed to the score on test samples, of the runs that trained."""
        return self.trained(arm).scores()

    def near_rank_losses(self, arm: Arm) -> dict[int, float]:
        """Seed to the primary near-rank loss, of the runs that trained."""
        runs = self.trained(arm).runs
        return {seed: run.near_rank_loss for seed, run in runs.items() if run.near_rank_loss is not None}

    def lost(self, arm: Arm, other: Arm) -> dict[int, float]:
        """Seed to the score of `other` minus that of `arm`."""
        return differences(self.scores(other), self.scores(arm))

    def growth(self, arm: Arm, other: Arm) -> dict[int, float]:
        """Seed to the near-rank loss of `arm` minus that of `other`, measured on probe sets of the same size."""
        sizes = [{run.num_probe_samples for run in each.runs.values()} for each in (arm, other)]
        if len(sizes[0] | sizes[1]) > 1:
            return {}
        return differences(self.near_rank_losses(arm), self.near_rank_losses(other))

    # -- text ---------------------------------------------------------------------------------------------------------

    def show(self, value: float, *, signed: bool = True) -> str:
        """A difference of scores, in the unit that is shown."""
        return self.metric.format_difference(value, signed=signed)

    def described(self, values: Outcomes, interval: Interval | None = None, *, turned: bool = False) -> str:
        """Mean and interval of differences of scores.

        Args:
            values: seed to difference.
            interval: replaces that of the seeds.
            turned: with the other sign.
        """
        interval = interval or self.look.interval(array_of(values))
        if turned:
            values = {seed: -value for seed, value in values.items()}
            interval = interval and (-interval[1], -interval[0])
        return described(values, lambda value: self.show(value, signed=False), interval)

    def loses(self, value: float) -> str:
        """The verb for a difference of scores: "loses", "adds" of a metric of which less is better, or "gains"."""
        if value < 0:
            return "gains" if self.metric.higher_is_better else "saves"
        return "loses" if self.metric.higher_is_better else "adds"

    @property
    def unit(self) -> str:
        """The unit with a space before it, to be written after a number; empty if there is none."""
        unit = "points" if self.metric.unit == "share" else self.metric.unit
        return f" {unit}" if unit else ""


def share(values: Outcomes, look: Look) -> str:
    """Mean and interval of differences of near-rank loss."""
    return described(values, "{:+.3f}".format, look.interval(array_of(values)))


def described(values: Outcomes, show: Callable[[float], str], interval: Interval | None) -> str:
    """Mean and interval as text.

    >>> described({0: 1.0, 1: 2.0}, "{:+.1f}".format, (0.5, 2.5))
    '+1.5 [+0.5, +2.5]'
    """
    mean = show(sum(values.values()) / len(values))
    if interval is None:
        return f"{mean} (one pair)"
    if interval[0] == interval[1]:
        return f"{mean} (the same in all {len(values)} pairs)"
    return f"{mean} [{show(interval[0])}, {show(interval[1])}]"


def completions(
    groups: Sequence[Mapping[int, Value]], seeds: Sequence[int], bounds: tuple[Value, Value] | None
) -> Iterator[list[dict[int, Value]]]:
    """The same values with every combination of the missing ones at the bounds; none if that cannot be done.

    Args:
        groups: seed to value, for each arm.
        seeds: with which a value is missing in some group.
        bounds: lowest and highest possible value; None if there are none.

    >>> [each[0] for each in completions([{0: 0.9}], [1], (0.0, 1.0))]
    [{0: 0.9, 1: 0.0}, {0: 0.9, 1: 1.0}]
    """
    holes = [(at, seed) for at, values in enumerate(groups) for seed in seeds if seed not in values]
    if bounds is None or len(holes) > MAX_MISSING:
        return
    for filled in product(bounds, repeat=len(holes)):
        out = [dict(values) for values in groups]
        for (at, seed), value in zip(holes, filled, strict=True):
            out[at][seed] = value
        yield out
