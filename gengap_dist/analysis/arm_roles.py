"""What an arm is to the baseline: only a larger batch, a scaled rate, longer training, or a penalty on rank.

Told by settings, not by names: those of two arms are first brought to what they amount to at the arm's own batch, so
that `optim.scaling=sqrt` at optim.base_size does not scale, and train.length_unit=updates is a number of epochs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gengap_dist.analysis.results import Run
from gengap_dist.config.identity import Settings, differing_settings, effective_settings

SAME = 0.02  # epochs and updates that differ by less are the same: the last step of an epoch may be ragged

RATE = {"optim.lr", "optim.warmup_epochs"}
LENGTH = {"train.epochs", "train.steps", "train.num_evals"}
NORM = {"model.norm", "batch.ghost_size"}
RANK = {"algorithm.rank_penalty", "algorithm.rank_measure", "algorithm.rank_layers"}


class Arm(NamedTuple):
    """An arm's runs by seed, finished ones only, and what all of them share."""

    name: str
    runs: Mapping[int, Run]
    global_size: int
    settings: Settings

    def accuracies(self) -> dict[int, float]:
        """Seed to test accuracy."""
        return {seed: run.accuracy for seed, run in self.runs.items() if run.accuracy is not None}


def arms_of(runs: Sequence[Run]) -> dict[str, Arm]:
    """Arms with their finished runs, in the order in which they come first."""
    out: dict[str, Arm] = {}
    for run in runs:
        arm = out.setdefault(run.arm, Arm(run.arm, {}, run.global_size, run.settings))
        if run.status == "finished":
            out[run.arm] = arm._replace(runs={**arm.runs, run.seed: run})
    return out


class Roles(NamedTuple):
    """Arms with a larger batch than the baseline's, by what else they differ in."""

    plain: list[Arm]
    """In nothing, with as many epochs."""
    scaled: list[Arm]
    """In a higher rate, or also in the warm-up."""
    longer: list[Arm]
    """In more epochs, and perhaps in the rate, or in the groups of batch norm."""
    penalised: list[tuple[Arm, Arm]]
    """Arms with a penalty on near-rank loss, of any batch, and their twins without it."""


def roles(arms: Mapping[str, Arm], baseline: str) -> Roles:
    """Who is who; an arm may be none of it."""
    found = Roles([], [], [], [])
    if baseline not in arms:
        return found
    base = arms[baseline]
    for arm in arms.values():
        if arm.settings.get("algorithm.rank_penalty") is not None:
            twins = [
                twin
                for twin in arms.values()
                if twin.settings.get("algorithm.rank_penalty") is None
                and twin.global_size == arm.global_size
                and differing_settings(arm.settings, twin.settings) <= RANK
            ]
            found.penalised.extend((arm, twin) for twin in twins[:1])
        elif arm.global_size > base.global_size:
            differs = differing_settings(arm.settings, base.settings)
            if not differs and same(_epochs(arm), _epochs(base)) is not False:
                found.plain.append(arm)
            elif differs <= RATE and _rate(arm) > _rate(base):
                found.scaled.append(arm)
            elif differs <= RATE | LENGTH | NORM and _epochs(arm) > _epochs(base):
                found.longer.append(arm)
    return found


def same(one: float, other: float) -> bool | None:
    """Whether two counts of updates or epochs are the same; None if one is not known.

    >>> same(8.0, 8.1), same(8.0, 2.0), same(0.0, 8.0)
    (True, False, None)
    """
    return abs(one - other) <= SAME * other if one > 0 and other > 0 else None


def without_rate(arm: Arm, arms: Sequence[Arm], base: Arm) -> Arm | None:
    """The arm of the same batch at the baseline's rate; None if there is none."""
    same_batch = (twin for twin in arms if twin.global_size == arm.global_size)
    return next((twin for twin in same_batch if not differing_settings(twin.settings, base.settings)), None)


def without_length(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm of the same batch that differs in its length only, and is shorter; None if there is none."""
    allowed = LENGTH | {"optim.warmup_epochs"}  # which train.length_unit=updates makes longer, too
    twins = (
        twin
        for twin in arms
        if twin.global_size == arm.global_size
        and differing_settings(twin.settings, arm.settings) <= allowed
        and _epochs(twin) < (1 - SAME) * _epochs(arm)
    )
    return min(twins, key=_epochs, default=None)


def _rate(arm: Arm) -> float:
    rate = effective_settings(arm.settings).get("optim.lr")
    return float(rate) if isinstance(rate, int | float) else 0.0


def _epochs(arm: Arm) -> float:
    return max((run.num_epochs for run in arm.runs.values()), default=0.0)
