"""The optimizer of a run."""

from typing import Any

import torch
from torch import nn

from gengap_dist.config import OptimConfig, UsageError


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the learning rate is set anew at every step, see `schedule`.

    Raises:
        UsageError: if the package it comes from is missing.
    """
    parameters = list(model.parameters())
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "lars":
        return _lars(parameters, common | momentum)
    return torch.optim.SGD(parameters, **common, **momentum, fused=True)


def _lars(parameters: list[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """LARS (You et al. 2017); biases and norm parameters have neither a trust ratio nor weight decay."""
    try:
        from timm.optim.lars import Lars
    except ImportError:
        raise UsageError('optim.name (lars) is timm\'s: pip install "gengap_dist[timm]", or choose another') from None
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "weight_decay": 0.0}]
    return Lars([group for group in groups if group["params"]], **settings)
