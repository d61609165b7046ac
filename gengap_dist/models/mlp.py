"""A fully connected network with batch norm before each ReLU; 5 x 512 is our reading of F1 in Keskar et al. 2017."""

from collections import OrderedDict

from torch import nn


def mlp(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int = 32,
    widths: tuple[int, ...] = (512,) * 5,
) -> nn.Sequential:
    """Images to logits through `widths` hidden units; layers are named fc1, fc2, ... and the classifier `head`.

    >>> model = mlp(num_classes=10, in_channels=1, image_size=4, widths=(8,))
    >>> [name for name, _ in model.named_children()]
    ['flatten', 'fc1', 'head']
    """
    sizes = [in_channels * image_size**2, *widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, units) in enumerate(zip(sizes, widths, strict=False), 1):
        layers[f"fc{number}"] = nn.Sequential(
            OrderedDict(affine=nn.Linear(inputs, units), norm=nn.BatchNorm1d(units), act=nn.ReLU())
        )
    layers["head"] = nn.Linear(sizes[-1], num_classes)
    return nn.Sequential(layers)
