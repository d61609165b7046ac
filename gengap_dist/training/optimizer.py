"""The optimizer of a run."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gengap_dist.config.sections import OptimConfig
from gengap_dist.errors import UsageError


def _plain(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """`kind` with the same methods, but for the wrappers that hide them from torch.compile.

    At their first call these import all of torch.compile, which takes longer than a small run. Networks are compiled
    here, optimizers are not.
    """
    wrapped = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


_SGD, _AdamW = _plain(torch.optim.SGD), _plain(torch.optim.AdamW)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names; rate and momentum are set anew at every step, see `schedule`.

    Raises:
        UsageError: if the package it comes from is missing.
    """
    parameters = list(model.parameters())
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    match config.name:
        case "sgd":
            return _SGD(parameters, **common, **momentum, fused=True)
        case "adamw":
            return _AdamW(parameters, **common, fused=True)
        case "lars":
            return _timm("Lars")(_layers(parameters), **common, **momentum)
        case "lamb":  # without a word it would clip the gradient's norm at 1
            lamb = _timm("Lamb")(_layers(parameters), **common, max_grad_norm=None)
            lamb.register_step_pre_hook(_recall_count)
            lamb.register_step_post_hook(_keep_count)
            return lamb


def _timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import timm.optim
    except ImportError:
        raise UsageError(
            f'optim.name ({name.lower()}) is timm\'s: pip install "gengap_dist[timm]", or choose another'
        ) from None
    return getattr(timm.optim, name)


def _layers(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of LARS (You et al. 2017) and LAMB (You et al. 2020): biases and norm parameters are neither adapted nor
    decayed. timm would adapt no layer that is not decayed, the papers do.
    """
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _recall_count(lamb: torch.optim.Optimizer, *_: object) -> None:
    """LAMB of timm counts steps in a group, which a checkpoint of parameters' states does not hold."""
    for group in lamb.param_groups:
        if kept := lamb.state.get(group["params"][0]):
            group["step"] = kept["step"].cpu()  # where it is already, unless a checkpoint has just been loaded


def _keep_count(lamb: torch.optim.Optimizer, *_: object) -> None:
    for group in lamb.param_groups:
        for parameter in group["params"]:
            if kept := lamb.state.get(parameter):
                kept["step"] = group["step"]
