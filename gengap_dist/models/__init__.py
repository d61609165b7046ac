"""Networks by name. The non-linearity of a layer is a module named `<layer>.act`, so that probes can name the layer."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gengap_dist.config.own_code import call_own, load_own, own_code
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.cgroups import free_memory
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError, did_you_mean, first_of
from gengap_dist.models.batch_norm import replace_batch_norm
from gengap_dist.models.c1 import c1
from gengap_dist.models.dropout import replace_random_layers
from gengap_dist.models.gpt import gpt
from gengap_dist.models.hf_transformers import transformers_model
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
    "gpt": gpt,
}
IMAGE_ARGUMENTS = ("num_classes", "in_channels", "image_size")
BUILT = "_gengap_built_as"  # attribute of a network that was made for a run
ZOOS: dict[str, Callable[..., nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": transformers_model,
}


def from_config(config: RunConfig, spec: DataSpec, world: World) -> nn.Module:
    """The network of `config` for samples as in `spec`, newly initialised, on the CPU, with the run's batch norm.

    Raises:
        UsageError: if a factory returns a network that was made before; see also `build` and `replace_batch_norm`.
    """
    name = config.model.name
    sizes = {"depth": config.model.depth, "width": config.model.width, "heads": config.model.heads}
    options = config.model.options
    model = build(name, spec, widths=config.model.widths, activation=config.model.activation, options=options, **sizes)
    if getattr(model, BUILT, None) == id(model):
        raise UsageError(
            f"model.name ({name}) returned a network that it returned before, with the weights that it has now: build "
            "a new one in each call"
        )
    setattr(model, BUILT, id(model))  # a copy has another id
    position = SamplePosition()
    replace_batch_norm(model, config.norm, ghost_size=config.batch.ghost_size, position=position, world=world)
    replace_random_layers(model, position)
    return model


def build(
    name: str,
    spec: DataSpec,
    *,
    widths: tuple[int, ...] | None = None,
    activation: str = "relu",
    options: Mapping[str, Any] | None = None,
    **sizes: int,
) -> nn.Module:
    """A newly initialised network: inputs [n, *spec.input_shape] to outputs [n, *spec.output_shape].

    Args:
        name: a key of MODELS, `torchvision:NAME`, `timm:NAME`, `transformers:NAME`, or a `module.path:factory` of the
            user. A factory receives those of input_shape, output_shape, widths, activation and options that its
            signature names; for images with classes also num_classes, in_channels and image_size (height and width, in
            pixels).
        spec: of the data set.
        widths: units in each hidden layer, for models with this argument.
        activation: `relu`, or `linear` for none, for models with this argument.
        options: by name, for models with this argument.
        sizes: depth, width and heads of gpt.

    Raises:
        UsageError: if the model is unknown or cannot be imported, needs other samples, has no such activation, or is
            larger than the memory of this machine.

    >>> sum(p.numel() for p in build("lenet5", DataSpec.images(num_classes=10, in_channels=1)).parameters())
    61706
    """
    factory = factory_of(name)
    arguments: dict[str, Any] = {"input_shape": spec.input_shape, "output_shape": spec.output_shape}
    arguments |= {"widths": widths, "activation": activation, "options": dict(options or {})}
    of_images: dict[str, Any] = {}
    if spec.is_image and spec.num_classes is not None:
        in_channels, image_size, _ = spec.input_shape
        of_images = {"num_classes": spec.num_classes, "in_channels": in_channels, "image_size": image_size}
    parameters = inspect.signature(factory).parameters.values()
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters} | ({"num_classes", "in_channels"} if has_kwargs and of_images else set())
    missing = [p.name for p in parameters if p.default is p.empty and p.name in IMAGE_ARGUMENTS and not of_images]
    if missing:
        raise UsageError(
            f"model.name ({name}) is built from {' and '.join(missing)}, for images with classes, and the samples are "
            f"inputs of shape {list(spec.input_shape)} with targets of shape {list(spec.target_shape)}: choose "
            f"{'gpt' if spec.token else 'mlp'}, or your own module.path:factory that takes input_shape and output_shape"
        )
    if activation != "relu" and "activation" not in names:
        raise UsageError(f"model.activation ({activation}) has no effect on {name}: choose relu, or lenet5 or mlp")
    if options and "options" not in names:
        raise UsageError(
            f"model.options ({first_of([*options])}) has no effect on {name}: remove it, or choose transformers:NAME"
        )
    arguments |= of_images | (sizes if name in MODELS else {})  # a user's factory has its own
    given = {key: value for key, value in arguments.items() if key in names and value is not None}
    if name in MODELS or name.partition(":")[0] in ZOOS:
        _check_memory(name, partial(factory, **given))
    is_own = name in own_code({"model": {"name": name}}).values()
    model = call_own("model.name", name, factory, **given) if is_own else factory(**given)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model.name ({name}) returned a {type(model).__name__}, needs a torch.nn.Module: return the network"
        )
    return model


class _WithoutRandomNumbers(TorchFunctionMode):
    """Leaves weights as they are: on the meta device, torch imports its compiler (1 to 2 s) to draw them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _check_memory(name: str, make: Callable[[], nn.Module]) -> None:
    """Refuse a network whose weights this machine cannot hold: they are counted on a device without memory.

    Raises:
        UsageError: names what makes it large.
    """
    remedy = "choose smaller model.widths or model.options, a smaller data.image_size, or another network"
    try:
        with torch.device("meta"), _WithoutRandomNumbers():
            weights = [*make().parameters()]
    except (RuntimeError, OverflowError, TypeError) as error:  # torch raises each of them
        if "verflow" not in str(error):
            raise
        raise UsageError(f"model.name ({name}) has more weights than 64 bits can count: {remedy}") from None
    needed, free = sum(weight.nbytes for weight in weights), free_memory()
    if needed > free:
        raise UsageError(
            f"model.name ({name}) has {needed / 2**30:,.1f} GiB of weights, and this machine has "
            f"{free / 2**30:,.1f} GiB of free memory: {remedy}"
        )


def factory_of(name: str) -> Callable[..., nn.Module]:
    """The function that builds the network `name`; a user's module is imported.

    Raises:
        UsageError: if the model is unknown or cannot be imported.
    """
    if name in MODELS:
        return MODELS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"model.name ({name}) is not a model{_similar(name)}: "
            f"choose one of {', '.join(MODELS)}, torchvision:NAME, timm:NAME, transformers:NAME, or module.path:factory"
        )
    if module_name in ZOOS:
        return partial(ZOOS[module_name], attribute)
    return load_own("model.name", name, "factory")


def _similar(name: str) -> str:
    """A hint with the network that an unknown name may stand for: one of this name in torchvision, or a similar one."""
    from torchvision import models

    is_known = name in models.list_models(module=models)
    return f" (did you mean torchvision:{name}?)" if is_known else did_you_mean(name, [*MODELS])
