"""What makes two runs the same experiment: all answers follow from what each setting affects (`sections.Affects`).

Two runs are the same run if they differ in `runtime` settings only: a run may be resumed so, and a study does not
repeat it. Two arms are the same experiment if they differ in no setting that affects the `result`: `gengap compare`
groups by that, an arm is "plain" if it differs in the batch only, and a counterpart differs in the remedy only.
"""

import json
from collections.abc import Collection, Hashable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from gengap_dist.config import batch_rules
from gengap_dist.config.loading import flat, renamed
from gengap_dist.config.sections import DEFAULT_EPS, Affects, Effect, RunConfig, Section, norm_rule

Settings = Mapping[str, object]
"""Settings of a run, by dotted name."""

REPLICATE = "seed"
"""It affects the result, but separates the runs of one arm, not arms."""
FACTOR = "batch.global_size"
"""The factor under study: it affects the result and separates arms, but is no part of a treatment."""

NO_RULES = {
    "optim.scaling": "none", "optim.beta2_scaling": "none", "optim.weight_decay_scaling": "none",
    "train.length_unit": "epochs",
}  # fmt: skip
"""Settings that say what follows the global batch, without effect."""
WHERE_IT_STOPS = ("train.target_accuracy", "train.target_loss", "train.num_evals")
"""The target is noticed at an evaluation."""
LOCAL_GROUPS = ("batch.micro_size", "launch.num_processes", "launch.max_processes")

LENGTHS = ("train.epochs", "train.steps", "train.tokens")
"""Settings that say how long a run is."""
FREE_OF_LENGTH = {
    "optim.schedule": "constant", "algorithm.local_sgd": None, "train.stop_at_target": False,
}  # fmt: skip
"""Settings of a run, and the value with which no step depends on how many follow."""


@cache
def declared_effect(name: str, root: type[Section] = RunConfig) -> Effect:
    """What the declaration of a setting says that it affects; `result` for settings of another program.

    A former name has the effect of the current one, and a name below a setting that of the setting.

    >>> declared_effect("optim.lr"), declared_effect("probe.every"), declared_effect("batch.micro_size")
    ('result', 'observation', 'runtime')
    >>> declared_effect("launch.resources_per_rank.CPU"), declared_effect("launch.backend"), declared_effect("launch.x")
    ('runtime', 'runtime', 'result')
    """
    head, _, rest = (renamed(name) or name).partition(".")
    field = root.model_fields.get(head)
    if field is None:
        return "result"
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        return declared_effect(rest, field.annotation)
    own: list[Effect] = [each.effect for each in field.metadata if isinstance(each, Affects)]
    return own[0] if own else root.affects


# -- the same run ------------------------------------------------------------------------------------------------------


def may_change_on_resume(name: str) -> bool:
    """Whether a run may be resumed with another value of a setting: its record stays that of one run."""
    return declared_effect(name) == "runtime"


def complete_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run by dotted name: one that did not exist when it started had its default then.

    >>> complete_settings({"seed": 3})["optim.lr"]
    0.02
    """
    return flat(RunConfig()) | flat(recorded)


def differences(before: Mapping[str, Any], after: BaseModel) -> str:
    """The settings in which two runs differ and may not, as a clause of a sentence; empty if there are none.

    >>> from gengap_dist.config.sections import OptimConfig
    >>> differences({"seed": 3}, RunConfig(seed=3))
    ''
    >>> differences(RunConfig().model_dump(mode="json"), RunConfig(seed=3, optim=OptimConfig(lr=1.0)))
    'seed (3) was 0 and optim.lr (1.0) was 0.02'
    """
    old, new = complete_settings(before), flat(after)
    names = [name for name in {**new, **old} if old.get(name) != new.get(name) and not may_change_on_resume(name)]
    return " and ".join(f"{name} ({new.get(name)}) was {old.get(name)}" for name in names)


def changed_on_resume(before: Mapping[str, Any], after: RunConfig) -> str:
    """As `differences`, for a run that is resumed: it may become longer if no step done so far depends on its length.

    >>> from gengap_dist.config.loading import validate
    >>> def changed(**settings):
    ...     was, now = ({"train": {"epochs": epochs}, "optim": settings} for epochs in (5, 9))
    ...     return changed_on_resume(flat(validate(RunConfig, was)), validate(RunConfig, now))
    >>> changed(), changed(schedule="cosine")
    ('', 'train.epochs (9) was 5, and optim.schedule (cosine) follows the length of the run,')
    >>> tokens = [{"data": {"name": "stdlib"}, "train": {"tokens": num}} for num in (1_000_000, 2_000_000)]
    >>> changed_on_resume(flat(validate(RunConfig, tokens[0])), validate(RunConfig, tokens[1]))
    ''
    """
    if not (changed := differences(before, after)):
        return ""
    old, new = complete_settings(before), flat(after)
    names = [name for name in new if old.get(name) != new[name] and not may_change_on_resume(name)]
    length = next((name for name in LENGTHS if names == [name]), None)
    if length is None or not old[length] or not new[length] or new[length] < old[length]:
        return changed
    if new["algorithm.weight_averaging"] == "swa":
        return f"{changed}, and algorithm.weight_averaging (swa) follows the length of the run,"
    follows = next((name for name, free in FREE_OF_LENGTH.items() if new[name] != free), None)
    return f"{changed}, and {follows} ({new[follows]}) follows the length of the run," if follows else ""


def identifying_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that determine what a run computes and records: equal for two configs of the same run.

    With model.norm=local the ranks and their micro-batches count, in case that the network has batch norm.

    >>> from gengap_dist.config.loading import merge, validate
    >>> small = {"batch": {"global_size": 8}, "optim": {"base_size": 8}}
    >>> a, b = ({"optim": {"base_size": 8, "scaling": rule}} for rule in ("none", "sqrt"))
    >>> a, b = (identifying_settings(validate(RunConfig, merge(small, changes))) for changes in (a, b))
    >>> a == b
    True
    """
    counted = LOCAL_GROUPS if config.norm == "local" else ()
    settings = {
        name: value
        for name, value in flat(config).items()
        if declared_effect(name) != "runtime" or name in counted
    }  # fmt: skip
    if config.batch.global_size == config.optim.base_size and config.algorithm.local_sgd != "swap":
        settings |= NO_RULES  # k = 1: all rules give the same
    if all(settings[name] == value for name, value in NO_RULES.items()):
        del settings["optim.base_size"]
    return settings


# -- the same experiment -----------------------------------------------------------------------------------------------


def affects_result(name: str, settings: Settings) -> bool:
    """Whether a setting affects what a run with these settings computes.

    Without `train.stop_at_target` the target only says what is recorded; with it the run ends there, at the first
    evaluation that reaches the target.

    >>> [affects_result("train.target_accuracy", {"train.stop_at_target": stops}) for stops in (False, True)]
    [False, True]
    """
    stops = bool(settings.get("train.stop_at_target")) and name in WHERE_IT_STOPS
    return stops or declared_effect(name) == "result"


def effective_settings(settings: Settings) -> dict[str, object]:
    """The settings that affect the result, at what they amount to at the run's batch, without batch and seed.

    Learning rate, warm-up, epochs, and betas, eps and weight decay are those at that batch (see `batch_rules`).

    >>> scaled = {"batch.global_size": 512, "optim.scaling": "sqrt", "optim.base_size": 128, "optim.lr": 0.1}
    >>> effective_settings(scaled | {"seed": 3, "launch.num_processes": 2})
    {'optim.lr': 0.2}
    >>> effective_settings(scaled | {"optim.scaling": "none", "train.length_unit": "updates", "train.epochs": 3})
    {'optim.lr': 0.1, 'train.epochs': 12.0}
    >>> effective_settings({"batch.global_size": 128, "batch.ghost_size": 128, "model.norm": "ghost"})  # one group
    {'batch.ghost_size': None, 'model.norm': 'sync'}
    """
    out = {name: value for name, value in settings.items() if name != REPLICATE and affects_result(name, settings)}
    size, base = out.pop(FACTOR, None), out.pop("optim.base_size", None)
    scaling, beta2_scaling, weight_decay_scaling, length_unit = (
        str(out.pop(name, none)) for name, none in NO_RULES.items()
    )
    factor = 1.0
    if isinstance(size, int | float) and isinstance(base, int | float) and base > 0:
        factor = size / base
    if out.get("algorithm.local_sgd") == "swap":  # they hold for the batch of a network, too
        rules = scaling, beta2_scaling, weight_decay_scaling
        out |= {name: rule for name, rule in zip(NO_RULES, rules, strict=False) if rule != "none"}
    if "model.norm" in out:
        out["model.norm"] = norm_rule(out["model.norm"], out.get("batch.ghost_size"))
    if size is not None and out.get("batch.ghost_size") == size and not out.get("batch.schedule"):
        out |= {"batch.ghost_size": None, "model.norm": "sync"}
    for name in ("optim.lr", "optim.adamw_lr") if out.get("optim.name") == "muon" else ("optim.lr",):
        _scale(out, name, batch_rules.lr_factor(scaling, factor))
    _scale(out, "optim.weight_decay", batch_rules.weight_decay_factor(weight_decay_scaling, factor))
    match out.get("optim.betas"):  # those of a run of another program may be anything
        case [int() | float() as beta1, int() | float() as beta2] if factor != 1.0:
            out["optim.betas"] = [*batch_rules.scaled_betas(scaling, beta2_scaling, (beta1, beta2), factor)]
        case _:
            pass
    if factor != 1.0 and scaling == "adam_sqrt":
        out["optim.eps"] = out.get("optim.eps") or DEFAULT_EPS
        _scale(out, "optim.eps", batch_rules.scaled_eps(scaling, 1.0, factor))
    _scale(out, "optim.warmup_epochs", factor if scaling == "legw" or length_unit == "updates" else 1.0)
    _scale(out, "train.epochs", factor if length_unit == "updates" else 1.0)
    return out


def _scale(settings: dict[str, object], name: str, factor: float) -> None:
    value = settings.get(name)
    if isinstance(value, int | float) and factor != 1.0:
        settings[name] = float(f"{value * factor:.9g}")


def differing_settings(one: Settings, other: Settings) -> set[str]:
    """Names of the settings that affect the result and in which two arms differ, except the batch.

    >>> differing_settings({"batch.global_size": 8, "optim.lr": 0.1}, {"batch.global_size": 64, "optim.lr": 0.1})
    set()
    """
    first, second = effective_settings(one), effective_settings(other)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def counterpart_key(settings: Settings, remedy: Collection[str] = ()) -> Hashable:
    """Equal for two arms if they have the same batch and differ in nothing that affects the result but a remedy.

    Many arms are grouped by it. Runs with the same key and no remedy are replicates of one arm.

    Args:
        settings: of the arm, by dotted name.
        remedy: names of the settings that may differ.

    >>> arm = {"batch.global_size": 8, "optim.lr": 0.1, "train.log_every": 1}
    >>> key, other = counterpart_key(arm), arm | {"optim.lr": 0.2}
    >>> key == counterpart_key(arm | {"train.log_every": 5, "seed": 3}), key == counterpart_key(other)
    (True, False)
    >>> counterpart_key(arm, {"optim.lr"}) == counterpart_key(other, {"optim.lr"})
    True
    """
    effective = {name: value for name, value in effective_settings(settings).items() if name not in remedy}
    return settings.get(FACTOR), _hashable({name: value for name, value in effective.items() if value is not None})


def _hashable(value: object) -> Hashable:
    """JSON values as tuples and sets, equal if the values are."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(each)) for name, each in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def treatment(settings: Settings, baseline: Settings) -> str:
    """The changes of an arm other than the batch, as `setting=value` words; "plain" if there are none.

    The words give the settings as they were set, not at the run's batch.
    `optim.base_size` is omitted if it equals the baseline's batch: the learning rate is then scaled from the baseline.

    Args:
        settings: of the arm, by dotted name.
        baseline: of the baseline, by dotted name.

    >>> baseline = {"batch.global_size": 32, "optim.scaling": "none", "optim.base_size": None, "data.augment": []}
    >>> treatment(baseline | {"batch.global_size": 256, "probe.every": 5}, baseline)
    'plain'
    >>> treatment(baseline | {"optim.scaling": "sqrt", "optim.base_size": 32, "data.augment": ["flip"]}, baseline)
    'data.augment=["flip"] optim.scaling=sqrt'
    """
    names = sorted(
        name
        for name in {*settings, *baseline} - {REPLICATE, FACTOR}
        if settings.get(name) != baseline.get(name)
        and (affects_result(name, settings) or affects_result(name, baseline))
        and not (name == "optim.base_size" and settings.get(name) == baseline.get(FACTOR))
    )
    return " ".join(f"{name}={_word(settings.get(name))}" for name in names) or "plain"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
