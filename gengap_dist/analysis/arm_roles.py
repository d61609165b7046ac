"""How an arm differs from the baseline: only batch and length, a scaled rate, longer training, or an intervention.

Decided by settings, not by names. The settings of two arms are first converted to their effective values at the arm's
own batch size, so that `optim.scaling=sqrt` at optim.base_size does not scale, and train.length_unit=updates is a
number of epochs. A scaled rate includes what the rules for Adam change with it, or in its place: betas, eps and weight
decay.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gengap_dist.analysis.results import Run
from gengap_dist.config.identity import LENGTHS, Settings, counterpart_key, differing_settings, effective_settings
from gengap_dist.config.sections import OptimConfig, norm_rule

SAME = 0.02  # epochs and updates that differ by less count as equal: the last step of an epoch may be smaller

SCALED = {
    "optim.lr": "learning rate",
    "optim.adamw_lr": "learning rate",
    "optim.betas": "betas",
    "optim.eps": "eps",
    "optim.weight_decay": "weight decay",
}
"""Settings that rules scale with the batch, and what they are called in a claim."""
RATE = {*SCALED, "optim.warmup_epochs", "optim.scaling", "optim.beta2_scaling", "optim.weight_decay_scaling"}
LENGTH = {*LENGTHS, "train.num_evals"}
LENGTH_AND_WARMUP = LENGTH | {"optim.warmup_epochs"}  # the same warm-up in updates is another number of epochs
NORM = {"model.norm", "batch.ghost_size"}
STRENGTH, MEASURE, PLACEBO_OF = "algorithm.rank_penalty", "algorithm.rank_measure", "algorithm.placebo_of"
SAME_MACHINERY = ("algorithm.rank_layers", "algorithm.rank_images")
"""What all interventions that are compared must share."""
RANK = {STRENGTH, MEASURE, PLACEBO_OF, *SAME_MACHINERY}
PLACEBO = "placebo"
DEFAULT_BETAS = OptimConfig().betas  # of a run that does not record any


class Arm(NamedTuple):
    """An arm: its runs by seed, and the settings that they share."""

    name: str
    runs: Mapping[int, Run]
    """The finished ones."""
    global_size: int
    settings: Settings
    unfinished: Mapping[int, Run] = {}
    """The others: diverged, failed, still running."""

    def scores(self) -> dict[int, float]:
        """Seed to score on the test samples."""
        scores = {seed: run.score for seed, run in self.runs.items() if run.score is not None}
        return {seed: score for seed, score in scores.items() if math.isfinite(score)}


def group_by_arm(runs: Sequence[Run]) -> dict[str, Arm]:
    """Arms with their runs, by name, in the order of their first runs."""
    out: dict[str, Arm] = {}
    for run in runs:
        arm = out.setdefault(run.arm, Arm(run.arm, {}, run.global_size, run.settings))
        if run.status == "finished":
            out[run.arm] = arm._replace(runs={**arm.runs, run.seed: run})
        else:
            out[run.arm] = arm._replace(unfinished={**arm.unfinished, run.seed: run})
    return out


class Intervention(NamedTuple):
    """An arm with a penalty on its activations, and the same arm without it."""

    arm: Arm
    natural: Arm
    kind: Literal["raise", "lower", "placebo"]
    """What it does to the rank: a positive strength raises it, a negative one lowers it, the placebo keeps it."""

    @property
    def measure(self) -> str:
        """What the penalty is made of; of a placebo, what it is the placebo of."""
        return str(self.arm.settings.get(PLACEBO_OF if self.kind == "placebo" else MEASURE))

    @property
    def strength(self) -> float:
        """Size of `algorithm.rank_penalty`."""
        return abs(_number(self.arm.settings.get(STRENGTH)))

    @property
    def machinery(self) -> tuple[str, ...]:
        """Penalized layers and number of images, as text: interventions with other ones are not compared."""
        return tuple(str(self.arm.settings.get(name)) for name in SAME_MACHINERY)


class Roles(NamedTuple):
    """Arms grouped by how they differ from the baseline; an arm may be in several groups, or in none."""

    plain: list[Arm]
    """A larger batch, any length, and nothing else."""
    other_length: list[Arm]
    """The baseline's batch with another number of updates, and nothing else: they should show no gap."""
    scaled: list[Arm]
    """A larger batch and more of what rules scale (`scaled_amounts`) than another arm or than the baseline, perhaps
    another warm-up."""
    longer: list[Arm]
    """A larger batch, trained longer than another arm or for more epochs than the baseline, perhaps with another
    learning rate or other batch-norm groups."""
    interventions: list[Intervention]
    """Of any batch size."""


def roles(arms: Mapping[str, Arm], baseline: str) -> Roles:
    """Group the arms by how they differ from `baseline`."""
    groups = Roles([], [], [], [], [])
    if baseline not in arms:
        return groups
    base = arms[baseline]
    natural = [arm for arm in arms.values() if arm.settings.get(STRENGTH) is None]
    first_natural = _smallest(natural, RANK, lambda arm: 0.0)
    shorter_of, unscaled_of = shorter_counterpart(natural), unscaled_counterpart(natural, base)
    for arm in arms.values():
        if arm.settings.get(STRENGTH) is not None:
            if without := first_natural(arm):
                groups.interventions.append(Intervention(arm, without, _kind(arm.settings)))
            continue
        differs = _differs_from_baseline(arm.settings, base.settings)
        if arm.global_size > base.global_size and differs <= RATE | LENGTH | NORM:
            plain = differs <= LENGTH_AND_WARMUP
            shorter, unscaled = shorter_of(arm), unscaled_of(arm)
            if plain:
                groups.plain.append(arm)
            if unscaled or (is_scaled_up(arm, base) and differs <= RATE | LENGTH and not shorter):
                groups.scaled.append(arm)
            if shorter or not (plain or unscaled or _epochs(arm) <= _epochs(base)):
                groups.longer.append(arm)
        same_batch = arm.global_size == base.global_size and arm.name != base.name
        if same_batch and differs <= LENGTH_AND_WARMUP and nearly_equal(updates(arm), updates(base)) is False:
            groups.other_length.append(arm)
    return groups


def _differs_from_baseline(settings: Settings, of_base: Settings) -> set[str]:
    """Names of the settings in which an arm differs from the baseline, except the batch.

    At a batch of one ghost group batch norm is the same as over the whole batch (sync): such a baseline differs neither
    from a larger batch with groups of that size nor from one that is normalised as a whole.

    >>> small = {"batch.global_size": 64, "model.norm": "ghost", "batch.ghost_size": 64}
    >>> groups, whole = small | {"batch.global_size": 512}, {"batch.global_size": 512, "model.norm": "sync"}
    >>> _differs_from_baseline(groups, small), _differs_from_baseline(whole, small)
    (set(), set())
    >>> sorted(_differs_from_baseline(groups | {"batch.ghost_size": 32}, small))
    ['batch.ghost_size', 'model.norm']
    """
    same = _batch_norm(settings) == _batch_norm(of_base)
    return differing_settings(settings, of_base) - (NORM if same else set())


def _batch_norm(settings: Settings) -> tuple[str, object]:
    """Its rule and the size of its ghost groups."""
    ghost_size = settings.get("batch.ghost_size")
    return norm_rule(settings.get("model.norm"), ghost_size), ghost_size


def _kind(settings: Mapping[str, object]) -> Literal["raise", "lower", "placebo"]:
    if settings.get(MEASURE) == PLACEBO:
        return "placebo"
    return "raise" if _number(settings.get(STRENGTH)) > 0 else "lower"


def rank_role(settings: Mapping[str, object]) -> str:
    """What an arm with these settings does to the rank, in one word; empty if it has no penalty.

    >>> [rank_role({STRENGTH: strength, MEASURE: "trace"}) for strength in (0.1, None)]
    ['trace', '']
    """
    if settings.get(STRENGTH) is None:
        return ""
    kind = _kind(settings)
    if kind == "raise":
        return "trace" if settings.get(MEASURE) == "trace" else "raised"
    return "lowered" if kind == "lower" else "placebo"


def updates(arm: Arm) -> float:
    """Optimizer steps of the longest finished run; 0 if none has finished."""
    return float(max((run.num_updates for run in arm.runs.values()), default=0))


def nearly_equal(one: float, other: float) -> bool | None:
    """Whether two counts of updates or epochs are equal within 2%; None if one is not known.

    >>> nearly_equal(8.0, 8.1), nearly_equal(8.0, 2.0), nearly_equal(0.0, 8.0)
    (True, False, None)
    """
    return abs(one - other) <= SAME * other if one > 0 and other > 0 else None


Counterpart = Callable[[Arm], Arm | None]
"""Finds the arm with which another one is compared; None if there is none."""


def unscaled_counterpart(arms: Iterable[Arm], base: Arm) -> Counterpart:
    """Finds the one of `arms` that differs only in that it scales less, and by its warm-up.

    Of several it is the one that is nearest to the baseline `base`: the lowest that is not below it, if there is one.
    """

    def order(arm: Arm) -> tuple[bool, ScaledAmounts]:
        amounts = scaled_amounts(arm)
        return any(amount < of_base for amount, of_base in zip(amounts, scaled_amounts(base), strict=True)), amounts

    lowest = _smallest(arms, RATE, order)

    def find(arm: Arm) -> Arm | None:
        other = lowest(arm)
        return other if other and is_scaled_up(arm, other) else None

    return find


class ScaledAmounts(NamedTuple):
    """The settings of an arm at its batch that rules scale with it, such that every rule raises them."""

    lr: float
    adamw_lr: float
    weight_decay: float
    forgetting: float
    """1 - beta2."""
    first_forgetting: float
    """1 - beta1."""


def scaled_amounts(arm: Arm) -> ScaledAmounts:
    """What the rules of `config.batch_rules` amount to at the arm's batch; that of eps goes with the learning rate."""
    settings = effective_settings(arm.settings)
    beta1, beta2 = DEFAULT_BETAS
    match settings.get("optim.betas"):  # those of a run of another program may be anything
        case [int() | float() as beta1, int() | float() as beta2]:
            pass
        case _:
            pass
    lr, adamw_lr, decay = (_number(settings.get(f"optim.{name}")) for name in ("lr", "adamw_lr", "weight_decay"))
    return ScaledAmounts(lr, adamw_lr, decay, 1 - beta2, 1 - beta1)


def is_scaled_up(arm: Arm, other: Arm) -> bool:
    """Whether an arm has more of something that rules scale with the batch than another, and of nothing less."""
    pairs = [*zip(scaled_amounts(arm), scaled_amounts(other), strict=True)]
    return all(one >= two for one, two in pairs) and any(one > two for one, two in pairs)


def scaled_names(arm: Arm, other: Arm) -> set[str]:
    """What is scaled in an arm compared to another, in words."""
    return {SCALED[name] for name in differing_settings(arm.settings, other.settings) & SCALED.keys()}


def shorter_counterpart(arms: Iterable[Arm]) -> Counterpart:
    """Finds the shortest of `arms` with the same batch size that differs by fewer epochs only."""
    shortest = _smallest(arms, LENGTH_AND_WARMUP, _epochs)

    def find(arm: Arm) -> Arm | None:
        other = shortest(arm)
        return other if other and _epochs(other) < (1 - SAME) * _epochs(arm) else None

    return find


def _smallest(arms: Iterable[Arm], remedy: Collection[str], size: Callable[[Arm], Any]) -> Counterpart:
    """Finds the first of the smallest of `arms` that differ from an arm in settings of the remedy only.

    By key and not pair by pair: a study may have hundreds of arms.
    """
    found: dict[Hashable, Arm] = {}
    for arm in arms:
        key = counterpart_key(arm.settings, remedy)
        if key not in found or size(arm) < size(found[key]):
            found[key] = arm
    return lambda arm: found.get(counterpart_key(arm.settings, remedy))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _epochs(arm: Arm) -> float:
    return max((run.num_epochs for run in arm.runs.values()), default=0.0)
