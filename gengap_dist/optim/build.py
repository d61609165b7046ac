"""The optimizer of a run."""

from collections.abc import Iterable

import torch
from torch import nn

from gengap_dist.config import OptimConfig


def build(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the learning rate is set anew at every step, see `schedule`."""
    parameters = list(parameters)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
