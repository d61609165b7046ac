"""Networks by name. A layer's non-linearity is a module called `<layer>.act`, so that probes can name the layer."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError, did_you_mean
from gengap_dist.models.batch_norm import replace_batch_norm
from gengap_dist.models.c1 import c1
from gengap_dist.models.dropout import replace_dropout
from gengap_dist.models.lenet5 import lenet5
from gengap_dist.models.mlp import f1, mlp
from gengap_dist.models.resnet import resnet
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.models.vgg16 import vgg16
from gengap_dist.models.zoo import timm_model, torchvision_model

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "vgg16": vgg16,
    **{f"resnet{depth}": partial(resnet, depth) for depth in (20, 44, 56, 110)},
    "f1": f1,
    "c1": c1,
    "mlp": mlp,
}
ZOOS: dict[str, Callable[..., nn.Module]] = {"torchvision": torchvision_model, "timm": timm_model}


def from_config(config: RunConfig, num_classes: int, in_channels: int, world: World) -> nn.Module:
    """The network that `config` names, freshly initialised, on the CPU, its batch norm and dropout as the run has them.

    Raises:
        UsageError: see `build` and `treat`.
    """
    model = build(
        config.model.name,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=config.data.image_size,
        widths=config.model.widths,
        activation=config.model.activation,
    )
    position = SamplePosition()
    replace_batch_norm(model, config.norm, ghost_size=config.batch.ghost_size, position=position, world=world)
    replace_dropout(model, position)
    return model


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int = 32,
    widths: tuple[int, ...] | None = None,
    activation: str = "relu",
) -> nn.Module:
    """A freshly initialised network; images [n, in_channels, image_size, image_size] to logits [n, num_classes].

    Args:
        name: a key of MODELS, `torchvision:NAME`, `timm:NAME`, or `module.path:factory` of the caller's own. A factory
            is given what its signature names of num_classes, in_channels, image_size, widths and activation.
        num_classes: width of the last layer.
        in_channels: channels of the images.
        image_size: side of the square images.
        widths: hidden widths, for models that have a choice.
        activation: `relu`, or `linear` for none at all, for models that have a choice.

    Raises:
        UsageError: if there is no such model, its factory fails, or it has no choice of activation.

    >>> sum(p.numel() for p in build("lenet5", num_classes=10, in_channels=1).parameters())
    61706
    """
    factory = _factory(name)
    offered = dict(
        num_classes=num_classes, in_channels=in_channels, image_size=image_size, widths=widths, activation=activation
    )
    parameters = inspect.signature(factory).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {"num_classes", "in_channels"} if takes_all else set()
    names |= {p.name for p in parameters}
    if activation != "relu" and "activation" not in names:
        raise UsageError(f"model.activation ({activation}) has no effect on {name}: choose relu, or lenet5 or mlp")
    model = factory(**{key: value for key, value in offered.items() if key in names and value is not None})
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model.name ({name}) made a {type(model).__name__}, needs a torch.nn.Module: return the network"
        )
    return model


def _factory(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        return MODELS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"model.name ({name}) is not a model{did_you_mean(name, [*MODELS])}: "
            f"choose one of {', '.join(MODELS)}, torchvision:NAME, timm:NAME, or module.path:factory"
        )
    if module_name in ZOOS:
        return partial(ZOOS[module_name], attribute)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"model.name ({name}) cannot be imported ({error}): "
            "give module.path:factory, with the module on PYTHONPATH or in the current folder"
        ) from None
