"""Strengths of rank penalties matched by bisection, on a seed that judges nothing, before the runs of a study.

A search depends on its runs only, so an interrupted one continues from their folders.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.study import Arm, Match, MatchSection, StudyConfig
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study.run_matrix import PlannedRun

STRENGTH = "algorithm.rank_penalty"


class Ends(NamedTuple):
    """Near-rank loss of the two arms without penalty on the seed of the search."""

    small: float
    large: float

    @property
    def growth(self) -> float:
        """What the larger batch adds."""
        return self.large - self.small


class Try(NamedTuple):
    """One run of a search."""

    strength: float
    """|algorithm.rank_penalty|."""
    status: str
    """Of run.json."""
    near_rank_loss: float | None = None
    """At the end; None: the run has none."""


class Search(NamedTuple):
    """What is known of the strength of one arm."""

    match: Match
    sign: int
    """Of the arm's algorithm.rank_penalty: 1 raises the rank, and so lowers near-rank loss."""
    tries: tuple[Try, ...]
    target: float | None
    """Near-rank loss to reach; None: not known."""
    tolerance: float
    """Largest distance from it that is a match; not positive: nothing to match."""
    next: float | None
    """Strength to try next; None: the search is over."""
    problem: str
    """Why it cannot be matched; empty if it is, or is not known yet."""

    @property
    def best(self) -> float | None:
        """The strength that comes nearest to the target; None if no run has a near-rank loss."""
        target = self.target
        if target is None:
            return None
        reached = [(abs(each.near_rank_loss - target), each) for each in self.tries if each.near_rank_loss is not None]
        return min(reached, key=lambda pair: pair[0])[1].strength if reached else None

    @property
    def is_matched(self) -> bool:
        """Whether the target is reached."""
        return self.next is None and not self.problem

    def settings(self, config: StudyConfig) -> dict[str, dict[str, float]]:
        """The strength found, for the arm and those that share it, each with its own sign; {}: theirs stay."""
        if self.best is None:
            return {}
        names = (self.match.arm, *self.match.shared)
        return {name: {STRENGTH: math.copysign(self.best, config.strength_of(name))} for name in names}

    def summary(self) -> Mapping[str, Any]:
        """The search for study.json."""
        trials = [
            {
                "setting": {STRENGTH: self.sign * each.strength},
                "status": each.status,
                "near_rank_loss": each.near_rank_loss,
            }
            for each in self.tries
        ]
        return {
            "trials": trials,
            "best": None if self.best is None else {STRENGTH: self.sign * self.best},
            "shared": list(self.match.shared),
            "to": self.match.to,
            "target": self.target,
            "tolerance": self.tolerance,
            "matched": self.is_matched,
            "problem": self.problem,
        }


def next_strength(section: MatchSection, sign: int, tries: tuple[Try, ...], target: float) -> float:
    """The middle, by logarithm, of the strengths between which the target lies, with four digits.

    A run that diverged was too strong.

    >>> section = MatchSection.model_validate(
    ...     {"arms": [{"arm": "lb-raise", "to": "sb"}], "between": ["sb", "lb"], "low": 0.01, "high": 1}
    ... )
    >>> next_strength(section, 1, (), 0.1)
    0.1
    >>> next_strength(section, 1, (Try(0.1, "finished", 0.05),), 0.1)  # the rank was raised too far
    0.03162
    >>> next_strength(section, -1, (Try(0.1, "finished", 0.05),), 0.1)  # it is still to be lowered
    0.3162
    >>> next_strength(section, -1, (Try(0.1, "diverged"),), 0.1)
    0.03162
    """
    low, high = section.low, section.high
    for each in tries:
        if each.near_rank_loss is None or sign * (target - each.near_rank_loss) > 0:
            high = each.strength
        else:
            low = each.strength
    return float(f"{math.sqrt(low * high):.4g}")


def final_near_rank_loss(folder: Path) -> float | None:
    """The near-rank loss that verdicts are about, at the last measurement of a run; None if it has none."""
    from gengap_dist.analysis.study_data import read_run  # loads numpy, which a study without a search does not need

    run = read_run(folder)
    found = run.untrained_and_trained(run.primary_measure)[1] if run.primary_measure else math.nan
    return found if math.isfinite(found) else None


def natural_runs(config: StudyConfig, out: Path) -> list[PlannedRun]:
    """The two arms without penalty that the growth lies between, on the seed of the search."""
    assert config.study.match is not None
    seed = config.study.match.seed
    return [
        PlannedRun(name, "natural", config.run_config(_arm(config, name), seed), out / "match" / name / "natural")
        for name in config.study.match.between
    ]


def planned_try(config: StudyConfig, out: Path, search: Search, number: int, strength: float) -> PlannedRun:
    """Run `number` of a search, with a strength."""
    assert config.study.match is not None
    name = search.match.arm
    settings = {STRENGTH: search.sign * strength}
    run = config.run_config(_arm(config, name), config.study.match.seed, settings)
    return PlannedRun(name, f"strength {search.sign * strength:g}", run, out / "match" / name / f"run{number:03d}")


def read_searches(
    config: StudyConfig, out: Path, status: Callable[[PlannedRun], RunStatus | None]
) -> tuple[list[Search], list[PlannedRun]]:
    """What the runs in `out` say of each search, and all runs of the searches so far with those that come next.

    Args:
        config: the study.
        out: its folder.
        status: of a run; None: it has not started.

    Raises:
        UsageError: if an arm is not valid at a strength.
    """
    section = config.study.match
    assert section is not None
    planned = natural_runs(config, out)
    statuses = [status(run) for run in planned]
    values = [final_near_rank_loss(run.folder) if known == RunStatus.FINISHED else None
              for run, known in zip(planned, statuses, strict=True)]  # fmt: skip
    has_ended = all(known is not None and known.has_result for known in statuses)
    small, large = values
    ends = Ends(small, large) if small is not None and large is not None else None
    searches = []
    for match in section.arms:
        search, runs = _replay(config, out, match, ends, status, natural_has_ended=has_ended)
        searches.append(search)
        planned += runs
    return searches, planned


def _replay(
    config: StudyConfig,
    out: Path,
    match: Match,
    ends: Ends | None,
    status: Callable[[PlannedRun], RunStatus | None],
    *,
    natural_has_ended: bool,
) -> tuple[Search, list[PlannedRun]]:
    section = config.study.match
    assert section is not None
    sign = 1 if config.strength_of(match.arm) > 0 else -1
    first, second = section.between
    target = None if ends is None else (ends.small if match.to == first else ends.large)
    tolerance = 0.0 if ends is None else section.tolerance * ends.growth
    search = Search(match, sign, (), target, tolerance, None, "")
    if target is None or tolerance <= 0:
        if not natural_has_ended:  # the first strength does not depend on the target
            strength = next_strength(section, sign, (), 0.0)
            return search._replace(next=strength), [planned_try(config, out, search, 0, strength)]
        why = (
            f"{first} or {second} has no near-rank loss on seed {section.seed}"
            if target is None
            else f"near-rank loss does not grow from {first} ({ends.small:.3g}) to {second} ({ends.large:.3g})"
            if ends
            else ""
        )
        return search._replace(problem=f"cannot be matched: {why}"), []
    runs: list[PlannedRun] = []
    while True:
        strength = next_strength(section, sign, search.tries, target)
        if len(search.tries) == section.max_runs:
            distances = [abs(each.near_rank_loss - target) for each in search.tries if each.near_rank_loss is not None]
            nearest = min(distances, default=math.nan)
            return search._replace(
                problem=f"cannot be matched: the nearest of {section.max_runs} runs is {nearest:.3g} away from "
                f"{target:.3g} of {match.to}, more than {tolerance:.3g}"
            ), runs
        run = planned_try(config, out, search, len(search.tries), strength)
        runs.append(run)
        known = status(run)
        if known is None or not known.has_result:
            return search._replace(next=strength), runs
        value = final_near_rank_loss(run.folder) if known == RunStatus.FINISHED else None
        search = search._replace(tries=(*search.tries, Try(strength, known, value)))
        if value is not None and abs(value - target) <= tolerance:
            return search, runs


def _arm(config: StudyConfig, name: str) -> Arm:
    return next(arm for arm in config.candidates if arm.name == name)
