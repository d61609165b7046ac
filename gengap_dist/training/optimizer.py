"""The optimizer of a run, by `optim.name`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gengap_dist.config.sections import DEFAULT_EPS, OptimConfig
from gengap_dist.errors import UsageError
from gengap_dist.training.muon import MuonWithAdamW
from gengap_dist.training.own_optimizer import own_optimizer


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


CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
LINEAR = (nn.Linear, nn.Bilinear, nn.Embedding, *CONVOLUTIONS)
"""Layers of torch whose parameters with several dimensions are weights, also those of one unit."""
NO_WEIGHTS = ("bias", "scale", "gamma", "beta", "token", "pos", "table")
"""Parts of names of parameters that are no weights of a layer."""

_SGD, _AdamW = _without_compile_wrappers(torch.optim.SGD), _without_compile_wrappers(torch.optim.AdamW)
_Muon, _MuonWithAdamW = _without_compile_wrappers(torch.optim.Muon), _without_compile_wrappers(MuonWithAdamW)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` selects; learning rate and momentum are set at every step, see `lr_schedule`.

    Betas, eps and weight decay are those of `config`: give `config.at_batch(global_size)`.

    Raises:
        UsageError: if the package of the optimizer is not installed, the network has no parameters for it, or a user's
            own is wrong.
    """
    parameters = list(model.parameters())
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.eps or {"lamb": 1e-6}.get(config.name, DEFAULT_EPS)}
    match config.name:
        case "sgd":
            return _SGD(parameters, **common, **momentum, fused=True)
        case "adamw":
            return _AdamW(parameters, **common, **adam, fused=True)
        case "lars":
            return _timm("Lars")(_layers(model), **common, **momentum)
        case "lamb":  # by default it would clip the gradient norm at 1
            lamb = _timm("Lamb")(_layers(model), **common, **adam, max_grad_norm=None)
            lamb.register_step_pre_hook(_restore_step_count)
            lamb.register_step_post_hook(_save_step_count)
            return lamb
        case "muon":
            matrices, others = hidden_matrices(model)
            adamw = _AdamW(others, **common | {"lr": config.adamw_lr}, **adam, fused=True)
            return _MuonWithAdamW(_Muon(matrices, **common, **momentum), adamw)
    return own_optimizer(config, model)


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of a network for Muon, and all its other parameters.

    Matrices are the weights of layers (see `is_layer_weight`) with two dimensions, without those of embeddings and of
    the output layer (Jordan et al. 2024). That is the last layer in the order of the modules, unless a norm follows:
    then the outputs are products with a parameter that is used twice, such as a table of tokens.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    >>> [[*parameter.shape] for parameter in hidden_matrices(model)[0]]
    [[5, 4]]

    Raises:
        UsageError: if there is none.
    """
    owned = [(each, *named) for each in model.modules() for named in each.named_parameters(recurse=False)]
    weights = [(module, parameter) for module, name, parameter in owned if is_layer_weight(module, name, parameter)]
    excluded = {parameter for module, parameter in weights if isinstance(module, nn.Embedding)}
    if weights:
        modules = list(model.modules())
        if not any(map(_is_norm, modules[modules.index(weights[-1][0]) + 1 :])):
            excluded.add(weights[-1][1])
    chosen = {parameter for _, parameter in weights if parameter.ndim == 2} - excluded
    if not chosen:
        raise UsageError(
            "optim.name (muon) is for the matrices between embeddings and output layer, and the network has none: "
            "choose adamw, or another network"
        )
    parameters = list(model.parameters())
    return [p for p in parameters if p in chosen], [p for p in parameters if p not in chosen]


def _timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import timm.optim
    except ImportError:
        raise UsageError(
            f'optim.name ({name.lower()}) needs timm: pip install "gengap_dist[timm]", or choose another'
        ) from None
    return getattr(timm.optim, name)


def _layers(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of LARS (You et al. 2017) and LAMB (You et al. 2020): weights of layers are adapted and decayed.

    All others are not: biases, parameters of norms, layer scales, position tables. timm does not adapt layers without
    weight decay; the papers do.
    """
    is_weight: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight[parameter] = is_weight.get(parameter, False) or is_layer_weight(module, name, parameter)
    parameters = list(model.parameters())
    weights, others = [p for p in parameters if is_weight[p]], [p for p in parameters if not is_weight[p]]
    groups = [{"params": weights, "always_adapt": True}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_layer_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter that `module` owns is the weight of a layer: a linear map between units, or an embedding.

    Those of torch's layers are known. Of other modules it is each parameter with two or more dimensions larger than 1,
    unless the class is a norm (by its name), or the parameter is called a bias, a scale, a token or a position.

    >>> norm, scale = nn.LayerNorm((4, 4)), nn.Parameter(torch.ones(8, 1, 1))
    >>> is_layer_weight(nn.Conv2d(1, 8, 3), "weight", nn.Conv2d(1, 8, 3).weight)
    True
    >>> is_layer_weight(norm, "weight", norm.weight), is_layer_weight(nn.Module(), "layer_scale", scale)
    (False, False)
    >>> table = nn.Parameter(torch.ones(1, 16, 8))
    >>> is_layer_weight(nn.Module(), "pos_embed", table), is_layer_weight(nn.Module(), "queries_to_keys", table)
    (False, True)
    """
    if parameter.ndim <= 1:
        return False
    if isinstance(module, LINEAR):
        return True
    is_matrix = sum(size > 1 for size in parameter.shape) > 1
    return is_matrix and not _is_norm(module) and not any(word in name.lower() for word in NO_WEIGHTS)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


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
