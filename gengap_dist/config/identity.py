"""Which settings define an experiment, and comparison of the settings of two runs."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gengap_dist.config.loading import flat
from gengap_dist.config.sections import RunConfig

EXECUTION_SETTINGS = (
    "launch.", "mlflow.", "checkpoint.", "batch.micro_size", "data.root", "data.download", "data.memory_gib",
    "data.workers", "data.device", "train.compile", "train.activation_checkpointing", "train.channels_last", "profile",
)  # fmt: skip
"""Settings of how and where a run is executed, not of what it computes: they may change when a run is resumed."""


def differences(before: Mapping[str, Any], after: BaseModel) -> str:
    """The settings that make two runs different experiments, as a clause of a sentence; empty if there are none.

    A setting that did not exist when the run started had its default then.

    >>> from gengap_dist.config.sections import OptimConfig
    >>> differences({"seed": 3}, RunConfig(seed=3))
    ''
    >>> differences(RunConfig().model_dump(mode="json"), RunConfig(seed=3, optim=OptimConfig(lr=1.0)))
    'seed (3) was 0 and optim.lr (1.0) was 0.02'
    """
    old, new = flat(RunConfig()) | flat(before), flat(after)
    names = [
        name for name in {**new, **old} if old.get(name) != new.get(name) and not name.startswith(EXECUTION_SETTINGS)
    ]
    return " and ".join(f"{name} ({new.get(name)}) was {old.get(name)}" for name in names)


NON_TREATMENT_SETTINGS = (
    *EXECUTION_SETTINGS,
    "study.",
    "seed",
    "batch.global_size",
    "probe.",
    "train.num_evals",
    "train.log_every",
)
"""Settings that are not part of a treatment: the global batch, the seed, and settings that only observe the run."""


def treatment(settings: Mapping[str, object], baseline: Mapping[str, object]) -> str:
    """The changes of an arm other than the batch, as `setting=value` words; "plain" if there are none.

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
        for name in {*settings, *baseline}
        if settings.get(name) != baseline.get(name)
        and not name.startswith(NON_TREATMENT_SETTINGS)
        and not (name == "optim.base_size" and settings.get(name) == baseline.get("batch.global_size"))
    )
    return " ".join(f"{name}={_word(settings.get(name))}" for name in names) or "plain"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


Settings = Mapping[str, object]


def effective_settings(settings: Settings) -> dict[str, object]:
    """Settings without the batch; learning rate, warm-up and epochs are those at that batch (see `optim.scaling`).

    >>> scaled = {"batch.global_size": 512, "optim.scaling": "sqrt", "optim.base_size": 128, "optim.lr": 0.1}
    >>> effective_settings(scaled)
    {'optim.lr': 0.2}
    >>> effective_settings(scaled | {"optim.scaling": "none", "train.length_unit": "updates", "train.epochs": 3})
    {'optim.lr': 0.1, 'train.epochs': 12.0}
    >>> effective_settings({"batch.global_size": 128, "batch.ghost_size": 128, "model.norm": "ghost"})  # one group
    {'batch.ghost_size': None, 'model.norm': 'sync'}
    """
    out = dict(settings)
    size, scaling = out.pop("batch.global_size", None), out.pop("optim.scaling", "none")
    base, length_unit = out.pop("optim.base_size", None), out.pop("train.length_unit", "epochs")
    factor = 1.0
    if isinstance(size, int | float) and isinstance(base, int | float) and base > 0:
        factor = size / base
    if size is not None and out.get("batch.ghost_size") == size:
        out |= {"batch.ghost_size": None, "model.norm": "sync"}
    _scale(out, "optim.lr", {"linear": factor, "sqrt": factor**0.5, "legw": factor**0.5}.get(str(scaling), 1.0))
    _scale(out, "optim.warmup_epochs", factor if scaling == "legw" or length_unit == "updates" else 1.0)
    _scale(out, "train.epochs", factor if length_unit == "updates" else 1.0)
    return out


def _scale(settings: dict[str, object], name: str, factor: float) -> None:
    value = settings.get(name)
    if isinstance(value, int | float) and factor != 1.0:
        settings[name] = float(f"{value * factor:.9g}")


def differing_settings(one: Settings, other: Settings) -> set[str]:
    """Names of the settings in which two arms differ, except the batch.

    >>> differing_settings({"batch.global_size": 8, "optim.lr": 0.1}, {"batch.global_size": 64, "optim.lr": 0.1})
    set()
    """
    first, second = effective_settings(one), effective_settings(other)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


REPORTING_SETTINGS = (
    "seed",
    "train.num_evals",
    "train.log_every",
    "train.target_accuracy",
)  # do not change what a run computes


def computed_settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that determine what a run computes, by dotted name: without seed, probes and execution.

    Args:
        info: the content of run.json.
    """
    return {
        name: value
        for name, value in flat(info["config"]).items()
        if not name.startswith((*EXECUTION_SETTINGS, "probe.")) and name not in REPORTING_SETTINGS
    }
