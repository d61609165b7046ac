"""The optimizer of a run."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gengap_dist.config.sections import OptimConfig
from gengap_dist.errors import UsageError


def _without_compile_wrappers(optimizer_class: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A subclass of `optimizer_class` without the wrappers that exclude its methods from torch.compile.

    At their first call the wrappers import torch.compile, which takes longer than a small run. This package compiles
    networks, not optimizers.
    """
    wrapped = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in wrapped}
    return type(
        optimizer_class.__name__,
        (optimizer_class,),
        methods | {"step": torch.no_grad()(inspect.unwrap(optimizer_class.step))},
    )


_SGD, _AdamW = _without_compile_wrappers(torch.optim.SGD), _without_compile_wrappers(torch.optim.AdamW)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` selects; learning rate and momentum are set at every step, see `lr_schedule`.

    Raises:
        UsageError: if the package of the optimizer is not installed.
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
        case "lamb":  # by default it would clip the gradient norm at 1
            lamb = _timm("Lamb")(_layers(parameters), **common, max_grad_norm=None)
            lamb.register_step_pre_hook(_restore_step_count)
            lamb.register_step_post_hook(_save_step_count)
            return lamb


def _timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import timm.optim
    except ImportError:
        raise UsageError(
            f'optim.name ({name.lower()}) needs timm: pip install "gengap_dist[timm]", or choose another'
        ) from None
    return getattr(timm.optim, name)


def _layers(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of LARS (You et al. 2017) and LAMB (You et al. 2020): biases and norm parameters are neither
    adapted nor decayed. timm does not adapt layers without weight decay; the papers do.
    """
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _restore_step_count(lamb: torch.optim.Optimizer, *_: object) -> None:
    """Restore the step count, which timm's LAMB keeps in the group, from the parameter state of the checkpoint."""
    for group in lamb.param_groups:
        if state := lamb.state.get(group["params"][0]):
            group["step"] = state["step"].cpu()  # unchanged, unless a checkpoint was just loaded


def _save_step_count(lamb: torch.optim.Optimizer, *_: object) -> None:
    for group in lamb.param_groups:
        for parameter in group["params"]:
            if state := lamb.state.get(parameter):
                state["step"] = group["step"]
