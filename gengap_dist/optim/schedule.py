"""The learning rate as a pure function of the step."""

import math

from gengap_dist.config import OptimConfig


def scaled_lr(config: OptimConfig, global_size: int) -> float:
    """The full rate for a global batch: linear (Goyal et al. 2017) or square-root (Hoffer et al. 2017) scaling.

    >>> scaled_lr(OptimConfig(lr=0.1, scaling="linear", base_size=256), global_size=1024)
    0.4
    """
    factor = global_size / (config.base_size or global_size)
    return config.lr * {"none": 1.0, "linear": factor, "sqrt": math.sqrt(factor)}[config.scaling]


def lr_at(step: int, config: OptimConfig, *, global_size: int, steps_per_epoch: int, num_steps: int) -> float:
    """The rate of step number `step` (from 0) of `num_steps`.

    Warm-up: rate * (step + 1) / W over the first W = warmup_epochs * steps_per_epoch steps. Cosine: from the full rate
    right after warm-up towards 0 at the end, rate * (1 + cos(pi t)) / 2 with t the share of the remaining steps done.

    >>> config = OptimConfig(lr=1.0, warmup_epochs=1.0)
    >>> [lr_at(s, config, global_size=8, steps_per_epoch=4, num_steps=8) for s in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    full = scaled_lr(config, global_size)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return full * (step + 1) / warmup
    if config.schedule == "cosine":
        return full * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2
    return full
