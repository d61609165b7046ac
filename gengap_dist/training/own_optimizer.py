"""A user's own optimizer: `optim.name=module.path:factory`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gengap_dist.config.own_code import call_own, load_own
from gengap_dist.config.sections import DEFAULT_EPS, OptimConfig
from gengap_dist.errors import UsageError


def own_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """What the factory `config.name` returns for `model`.

    The factory is called with the network and with those of lr, momentum, nesterov, weight_decay, betas and eps that
    its signature names.

    Raises:
        UsageError: if it cannot be imported, fails, or returns something that cannot train the network.
    """
    name = f"optim.name ({config.name})"
    factory = load_own("optim.name", config.name, "factory")
    if not callable(factory):
        raise UsageError(f"{name} is not a function of the network: name a function")
    optimizer = call_own("optim.name", config.name, factory, model, **_arguments(factory, config))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"{name} returned a {type(optimizer).__name__}, needs a torch.optim.Optimizer: return the optimizer"
        )
    _check_parameters(name, optimizer, model)
    if any("lr" not in group for group in optimizer.param_groups):
        raise UsageError(f"{name} returned an optimizer without a learning rate lr in each group: give it one")
    if any(p.default is p.empty and p.kind in _GIVEN for p in inspect.signature(optimizer.step).parameters.values()):
        raise UsageError(
            f"{name} returned a {type(optimizer).__name__}, whose step needs a closure: choose an optimizer that takes "
            "the gradients as they are"
        )
    return optimizer


_GIVEN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _arguments(factory: Callable[..., Any], config: OptimConfig) -> dict[str, Any]:
    settings = {
        "lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov,
        "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps or DEFAULT_EPS,
    }  # fmt: skip
    return {key: value for key, value in settings.items() if key in inspect.signature(factory).parameters}


def _check_parameters(name: str, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    given = {p for group in optimizer.param_groups for p in group["params"]}
    if given - {*model.parameters()}:
        raise UsageError(
            f"{name} returned an optimizer of parameters that the network does not have: build it from the network "
            "that the function gets"
        )
    if missing := [key for key, p in model.named_parameters() if p.requires_grad and p not in given]:
        raise UsageError(
            f"{name} returned an optimizer without the parameter {missing[0]}: give it all parameters, or set "
            "requires_grad to False in the network for those that are not trained"
        )
