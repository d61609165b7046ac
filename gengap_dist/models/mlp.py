"""Fully connected networks with batch norm before each non-linearity."""

from collections import OrderedDict

from torch import nn

from gengap_dist.models.blocks import activated

F1_WIDTHS = (512,) * 5


def mlp(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int = 32,
    widths: tuple[int, ...] = F1_WIDTHS,
    activation: str = "relu",
) -> nn.Sequential:
    """Images to logits through `widths` hidden units; layers are named fc1, fc2, ... and the classifier `head`.

    >>> model = mlp(num_classes=10, in_channels=1, image_size=4, widths=(8,))
    >>> [name for name, _ in model.named_children()]
    ['flatten', 'fc1', 'head']
    """
    sizes = [in_channels * image_size**2, *widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, units) in enumerate(zip(sizes, widths, strict=False), 1):
        layers[f"fc{number}"] = activated(nn.Linear(inputs, units), nn.BatchNorm1d(units), activation)
    layers["head"] = nn.Linear(sizes[-1], num_classes)
    return nn.Sequential(layers)


def f1(*, num_classes: int, in_channels: int, image_size: int = 28) -> nn.Sequential:
    """F1 of Keskar et al. 2017: five hidden layers of 512, on their 28 x 28 x 1 images 1,462,794 parameters."""
    return mlp(num_classes=num_classes, in_channels=in_channels, image_size=image_size, widths=F1_WIDTHS)
