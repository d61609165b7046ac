"""What makes two runs the same experiment."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gengap_dist.config.loading import flat
from gengap_dist.config.sections import RunConfig

MACHINERY = (
    "launch.", "mlflow.", "checkpoint.", "batch.micro_size", "data.root", "data.download", "data.memory_gib",
    "data.workers", "data.device", "train.compile", "train.recompute", "train.channels_last", "profile",
)  # fmt: skip
"""Settings that say how and where a run is computed, not what it computes: they may change when it is resumed."""


def differences(before: Mapping[str, Any], after: BaseModel) -> str:
    """The settings that make two runs different experiments, as a clause of a sentence; empty if there are none.

    A setting that there was not yet when a run began had its default then.

    >>> from gengap_dist.config.sections import OptimConfig
    >>> differences({"seed": 3}, RunConfig(seed=3))
    ''
    >>> differences(RunConfig().model_dump(mode="json"), RunConfig(seed=3, optim=OptimConfig(lr=1.0)))
    'seed (3) was 0 and optim.lr (1.0) was 0.02'
    """
    old, new = flat(RunConfig()) | flat(before), flat(after)
    names = [name for name in {**new, **old} if old.get(name) != new.get(name) and not name.startswith(MACHINERY)]
    return " and ".join(f"{name} ({new.get(name)}) was {old.get(name)}" for name in names)
