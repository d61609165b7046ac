"""Untrained networks of torchvision and timm by name, for any number of classes and channels."""

from typing import Any

from torch import nn

from gengap_dist.errors import UsageError, did_you_mean


def torchvision_model(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """A network of `torchvision.models`; the first convolution is replaced if the images do not have three channels.

    Raises:
        UsageError: if the network is unknown, or does not accept images of this size.

    >>> torchvision_model("resnet18", num_classes=10, in_channels=1, image_size=32).conv1.in_channels
    1
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(
            f"model.name (torchvision:{name}) is not a network of torchvision.models{did_you_mean(name, known)}: "
            "see torchvision.models.list_models()"
        )
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):  # a single output, also in training
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model = models.get_model(name, weights=None, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"model.name (torchvision:{name}) cannot be built for images of {image_size} x {image_size} "
            f"({error or type(error).__name__}): choose another data.image_size or another network"
        ) from None
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    path, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, last = path.rpartition(".")
    settings: dict[str, Any] = {
        key: getattr(first, key) for key in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    }
    setattr(model.get_submodule(parent), last, nn.Conv2d(in_channels, bias=first.bias is not None, **settings))


def timm_model(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """A network of timm by name.

    Raises:
        UsageError: if timm is not installed, or the network is unknown or does not accept images of this size.
    """
    try:
        import timm
    except ImportError:
        raise UsageError(f"model.name (timm:{name}) needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        raise UsageError(
            f"model.name (timm:{name}) is not a network of timm{did_you_mean(name, timm.list_models())}: "
            "see timm.list_models()"
        )
    pretrained_config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if getattr(pretrained_config, "fixed_input_size", False):
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=False, **options)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(
            f"model.name (timm:{name}) cannot be built for images of {image_size} x {image_size} "
            f"({error or type(error).__name__}): choose another data.image_size or another network"
        ) from None
