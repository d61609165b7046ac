"""Fully connected networks with batch norm before each non-linearity."""

import math
from collections import OrderedDict

from torch import nn

from gengap_dist.models.blocks import activated

F1_WIDTHS = (512,) * 5


def mlp(
    *,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    widths: tuple[int, ...] = F1_WIDTHS,
    activation: str = "relu",
) -> nn.Sequential:
    """Multilayer perceptron with `widths` hidden units; layers are named fc1, fc2, ..., and the last one `head`.

    >>> model = mlp(input_shape=(1, 4, 4), output_shape=(10,), widths=(8,))
    >>> [name for name, _ in model.named_children()]
    ['flatten', 'fc1', 'head']
    """
    sizes = [math.prod(input_shape), *widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, units) in enumerate(zip(sizes, widths, strict=False), 1):
        layers[f"fc{number}"] = activated(nn.Linear(inputs, units), nn.BatchNorm1d(units), activation)
    layers["head"] = nn.Linear(sizes[-1], math.prod(output_shape))
    if len(output_shape) != 1:
        layers["unflatten"] = nn.Unflatten(1, output_shape)
    return nn.Sequential(layers)


def f1(*, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> nn.Sequential:
    """F1 of Keskar et al. 2017: five hidden layers of 512 units; 1,462,794 parameters on 28 x 28 x 1 images."""
    return mlp(input_shape=input_shape, output_shape=output_shape, widths=F1_WIDTHS)
