"""C1 of Keskar et al. 2017, a small AlexNet. The paper describes it in one paragraph; other details are chosen here."""

from collections import OrderedDict

from torch import nn

from gengap_dist.models.blocks import activated


def c1(*, num_classes: int, in_channels: int, image_size: int = 32) -> nn.Sequential:
    """Two 5 x 5 convolutions with 64 filters and stride 2, each with 3 x 3 max pooling; 384 and 192 units; `head`.

    All hidden layers have batch norm; the two fully connected ones have dropout with probability 0.5. The paper gives
    neither pooling stride nor padding: here pooling has stride 2 as in AlexNet, and the padding is chosen so that
    convolution and pooling each halve the image, rounding up. 283,274 parameters on 32 x 32 x 3 with 10 classes.
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
