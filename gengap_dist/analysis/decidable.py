"""Which claims a study can decide, and which arms the others lack: known from the settings, before the first run.

The roles of arms are those by which the finished study is judged (`arm_roles`); an arm stands for the runs that are
planned. Whether the runs then decide a claim depends on what they find.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gengap_dist.analysis.arm_roles import (
    Arm,
    Roles,
    rank_role,
    roles,
    shorter_counterpart,
    unscaled_counterpart,
    updates,
)
from gengap_dist.analysis.results import Run
from gengap_dist.analysis.rules.explanation import missing_for_explanation
from gengap_dist.analysis.rules.judged import JudgedStudy
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.rules.remedies import ENOUGH_UPDATES
from gengap_dist.analysis.rules.training import judge_training
from gengap_dist.runs.metric import ACCURACY

PROBED = ("near_rank_loss_grows", "explains")  # claims that need near-rank loss


class Planned(NamedTuple):
    """An arm as it will run."""

    settings: Mapping[str, object]
    """By dotted name."""
    num_updates: int
    num_epochs: float


class Decidable(NamedTuple):
    """A claim before the runs."""

    key: str
    """As `results.Claim.key`."""
    claim: str
    missing: str
    """What the study lacks to decide it; empty if there is nothing."""


class Outlook(NamedTuple):
    """What is known of a study before its runs."""

    role_of: Mapping[str, str]
    """By arm: baseline, plain, scaled, longer, raised, lowered, trace, placebo, other length, other."""
    claims: Sequence[Decidable]


def outlook(arms: Mapping[str, Planned], baseline: str, seeds: Sequence[int]) -> Outlook:
    """Roles of the arms, and what each claim lacks.

    Args:
        arms: all arms, by name.
        baseline: name of the arm that the others are compared with.
        seeds: of the study.
    """
    planned = {name: _arm(name, arm, seeds) for name, arm in arms.items()}
    base, found = planned[baseline], roles(planned, baseline)
    training = judge_training(planned, base, 0.0, Look(), is_share=True)
    study = JudgedStudy(ACCURACY, 0.0, Look(), base, planned, found, training)
    missing = {
        "gap": "" if found.plain else f"an arm with a larger batch than {baseline}, and nothing else set",
        "near_rank_loss_grows": "" if found.plain else f"an arm with a larger batch than {baseline}",
        "explains": _explanation(study),
        "scaling": _scaling(study),
        "longer_training": _longer(study),
    }
    if not all(arm.settings.get("probe.enabled", True) for arm in arms.values()):
        missing |= dict.fromkeys(PROBED, "near-rank loss: set probe.enabled=true")
    if len(seeds) < 2:
        missing = dict.fromkeys(missing, "a second seed: pairs of one seed have no interval")
    claims = {
        "gap": "a larger batch generalizes worse at equal training",
        "near_rank_loss_grows": "near-rank loss grows with the batch",
        "explains": "near-rank loss causes the loss",
        "scaling": "scaling the learning rate does not resolve it",
        "longer_training": "longer training does not resolve it",
    }
    role_of = {name: _role(planned[name], found, baseline) for name in planned}
    return Outlook(role_of, [Decidable(key, text, missing[key]) for key, text in claims.items()])


def _arm(name: str, arm: Planned, seeds: Sequence[int]) -> Arm:
    size = arm.settings["batch.global_size"]
    assert isinstance(size, int)
    length = {"num_updates": arm.num_updates, "num_epochs": arm.num_epochs, "settings": arm.settings}
    nothing = {"score": None, "measures": {}, "own_batch": {}, "own_batch_untrained": {}, "num_probe_samples": None}
    rest = {**length, **nothing, "target": None, "updates_to_target": None}
    runs = {seed: Run(arm=name, seed=seed, status="finished", global_size=size, **rest) for seed in seeds}
    return Arm(name, runs, size, arm.settings)


def _explanation(study: JudgedStudy) -> str:
    if not study.roles.plain:
        return "an arm with a larger batch, and arms that raise and lower the rank, with placebos"
    largest = max(study.roles.plain, key=lambda arm: arm.global_size)
    if not all(missing_for_explanation(study, large) for large in study.roles.plain):
        return ""
    return f"{missing_for_explanation(study, largest)} ({largest.name})"


def _scaling(study: JudgedStudy) -> str:
    find = unscaled_counterpart(study.arms.values(), study.base)
    if any(find(arm) for arm in study.roles.scaled):
        return ""
    return "an arm with a larger batch and optim.scaling, beside the same arm without"


def _longer(study: JudgedStudy) -> str:
    find = shorter_counterpart(study.arms.values())
    longer = [arm for arm in study.roles.longer if find(arm)]
    if not longer:
        return "an arm with a larger batch and train.length_unit=updates, beside the same arm without"
    most, needed = max(longer, key=updates), updates(study.base)
    if updates(most) >= ENOUGH_UPDATES * needed:
        return ""
    return f"an arm with as many updates as the baseline: {most.name} has {updates(most):,.0f} of {needed:,.0f}"


def _role(arm: Arm, found: Roles, baseline: str) -> str:
    """The role of an arm; with several, all of them."""
    if arm.name == baseline:
        return "baseline"
    if any(each.arm.name == arm.name for each in found.interventions):
        return rank_role(arm.settings)
    groups = {"plain": found.plain, "scaled": found.scaled, "longer": found.longer, "other length": found.other_length}
    return " + ".join(name for name, group in groups.items() if any(each.name == arm.name for each in group)) or "other"
