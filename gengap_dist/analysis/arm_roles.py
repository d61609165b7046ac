"""How an arm differs from the baseline: only a larger batch, a scaled learning rate, longer training, or a penalty.

Decided by settings, not by names. The settings of two arms are first converted to their effective values at the arm's
own batch size, so that `optim.scaling=sqrt` at optim.base_size does not scale, and train.length_unit=updates is a
number of epochs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gengap_dist.analysis.results import Run
from gengap_dist.config.identity import Settings, differing_settings, effective_settings, is_counterpart

SAME = 0.02  # epochs and updates that differ by less count as equal: the last step of an epoch may be smaller

RATE = {"optim.lr", "optim.warmup_epochs", "optim.scaling"}
LENGTH = {"train.epochs", "train.steps", "train.num_evals"}
NORM = {"model.norm", "batch.ghost_size"}
RANK = {f"algorithm.{name}" for name in ("rank_penalty", "rank_measure", "rank_layers", "rank_images", "placebo_of")}


class Arm(NamedTuple):
    """An arm: its finished runs by seed, and the settings that they share."""

    name: str
    runs: Mapping[int, Run]
    global_size: int
    settings: Settings

    def scores(self) -> dict[int, float]:
        """Seed to score on the test samples."""
        return {seed: run.score for seed, run in self.runs.items() if run.score is not None}


def group_by_arm(runs: Sequence[Run]) -> dict[str, Arm]:
    """Arms with their finished runs, by name, in the order of their first runs."""
    out: dict[str, Arm] = {}
    for run in runs:
        arm = out.setdefault(run.arm, Arm(run.arm, {}, run.global_size, run.settings))
        if run.status == "finished":
            out[run.arm] = arm._replace(runs={**arm.runs, run.seed: run})
    return out


class Roles(NamedTuple):
    """Arms grouped by how they differ from the baseline; except `penalised`, all have a larger batch."""

    plain: list[Arm]
    """Differ only in the batch; same number of epochs."""
    scaled: list[Arm]
    """Have a higher learning rate, and perhaps another warm-up."""
    longer: list[Arm]
    """Train for more epochs, perhaps with another learning rate or other batch-norm groups."""
    penalised: list[tuple[Arm, Arm]]
    """(arm with a penalty on near-rank loss, the same arm without it), of any batch size."""


def roles(arms: Mapping[str, Arm], baseline: str) -> Roles:
    """Group the arms by how they differ from `baseline`; an arm may be in no group."""
    groups = Roles([], [], [], [])
    if baseline not in arms:
        return groups
    base = arms[baseline]
    for arm in arms.values():
        if arm.settings.get("algorithm.rank_penalty") is not None:
            controls = [
                other
                for other in arms.values()
                if other.settings.get("algorithm.rank_penalty") is None
                and is_counterpart(arm.settings, other.settings, RANK)
            ]
            groups.penalised.extend((arm, other) for other in controls[:1])
        elif arm.global_size > base.global_size:
            differs = differing_settings(arm.settings, base.settings)
            if not differs and nearly_equal(_epochs(arm), _epochs(base)) is not False:
                groups.plain.append(arm)
            elif differs <= RATE and _rate(arm) > _rate(base):
                groups.scaled.append(arm)
            elif differs <= RATE | LENGTH | NORM and _epochs(arm) > _epochs(base):
                groups.longer.append(arm)
    return groups


def nearly_equal(one: float, other: float) -> bool | None:
    """Whether two counts of updates or epochs are equal within 2%; None if one is not known.

    >>> nearly_equal(8.0, 8.1), nearly_equal(8.0, 2.0), nearly_equal(0.0, 8.0)
    (True, False, None)
    """
    return abs(one - other) <= SAME * other if one > 0 and other > 0 else None


def unscaled_counterpart(arm: Arm, arms: Sequence[Arm], base: Arm) -> Arm | None:
    """The arm with the same batch size at the baseline's learning rate; None if there is none."""
    same_batch = (other for other in arms if other.global_size == arm.global_size)
    return next((other for other in same_batch if not differing_settings(other.settings, base.settings)), None)


def shorter_counterpart(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The shortest arm with the same batch size that differs only by fewer epochs; None if there is none."""
    allowed = LENGTH | {"optim.warmup_epochs"}  # train.length_unit=updates lengthens it, too
    shorter = (
        other
        for other in arms
        if is_counterpart(arm.settings, other.settings, allowed) and _epochs(other) < (1 - SAME) * _epochs(arm)
    )
    return min(shorter, key=_epochs, default=None)


def _rate(arm: Arm) -> float:
    rate = effective_settings(arm.settings).get("optim.lr")
    return float(rate) if isinstance(rate, int | float) else 0.0


def _epochs(arm: Arm) -> float:
    return max((run.num_epochs for run in arm.runs.values()), default=0.0)
