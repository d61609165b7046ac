"""What sets an arm apart from the baseline."""

import json
from collections.abc import Mapping

from gengap_dist.config.identity import MACHINERY

BESIDES = (*MACHINERY, "study.", "seed", "batch.global_size", "probe.", "train.num_evals", "train.log_every")
"""Settings that are no part of a recipe: the batch itself, the seed, and what only looks at the run."""


def recipe(settings: Mapping[str, object], baseline: Mapping[str, object]) -> str:
    """What an arm changes besides the batch, as `setting=value` words; "plain" if nothing.

    `optim.base_size` is left out where it is the baseline's batch: it says from where the rate is scaled, as it should.

    Args:
        settings: the arm's, by dotted name.
        baseline: the baseline's.

    >>> baseline = {"batch.global_size": 32, "optim.scaling": "none", "optim.base_size": None, "data.augment": []}
    >>> recipe(baseline | {"batch.global_size": 256, "probe.every": 5}, baseline)
    'plain'
    >>> recipe(baseline | {"optim.scaling": "sqrt", "optim.base_size": 32, "data.augment": ["flip"]}, baseline)
    'data.augment=["flip"] optim.scaling=sqrt'
    """
    names = sorted(
        name
        for name in {*settings, *baseline}
        if settings.get(name) != baseline.get(name)
        and not name.startswith(BESIDES)
        and not (name == "optim.base_size" and settings.get(name) == baseline.get("batch.global_size"))
    )
    return " ".join(f"{name}={_word(settings.get(name))}" for name in names) or "plain"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
