"""C1 of Keskar et al. 2017, a small AlexNet; our reading of one paragraph."""

from collections import OrderedDict

from torch import nn

from gengap_dist.models.blocks import activated


def c1(*, num_classes: int, in_channels: int, image_size: int = 32) -> nn.Sequential:
    """Two convolutions of 64 filters, 5 x 5 with stride 2, each with max pooling over 3; 384 and 192 units; `head`.

    Batch norm in every hidden layer, dropout of one half in the two fully connected ones. The paper gives neither the
    pooling's stride nor paddings: here pooling has stride 2, as AlexNet's has, and both are padded so that each halves
    the image, rounding up, whatever its size. On 32 x 32 x 3 with 10 classes: 283,274 parameters.
    """
    side = -(-image_size // 16)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, inputs in enumerate([in_channels, 64], 1):
        conv = nn.Conv2d(inputs, 64, 5, stride=2, padding=2)
        layers[f"conv{number}"] = activated(conv, nn.BatchNorm2d(64), pool=nn.MaxPool2d(3, stride=2, padding=1))
    layers["flatten"] = nn.Flatten()
    for number, (inputs, units) in enumerate([(64 * side * side, 384), (384, 192)], 1):
        layers[f"fc{number}"] = activated(nn.Linear(inputs, units), nn.BatchNorm1d(units), dropout=nn.Dropout(0.5))
    layers["head"] = nn.Linear(192, num_classes)
    return nn.Sequential(layers)
