"""VGG-16 for small images: our reading of configuration D of Simonyan & Zisserman 2015, as it is used on CIFAR."""

from collections import OrderedDict

from torch import nn

from gengap_dist.errors import UsageError
from gengap_dist.models.blocks import activated, he_init

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions between two poolings."""


def vgg16(*, num_classes: int, in_channels: int, image_size: int = 32) -> nn.Sequential:
    """13 convolutions conv1_1 ... conv5_3 with batch norm, in five stages that halve the image; then fc1, fc2, fc3.

    The original's fully connected layers of 4,096 are 512 wide here, for an image of 32 pixels is 1 x 1 x 512 after the
    last pooling; they have neither batch norm nor dropout. Convolutions keep their biases, so that without batch norm
    this is the plain VGG-16. Parameters on 32 x 32 x 3 with 10 classes: 15,253,578, of which 8,448 are batch norm's.

    Raises:
        UsageError: if the image cannot be halved five times.
    """
    if image_size % 32:
        raise UsageError(
            f"data.image_size ({image_size}) cannot be halved five times by vgg16: choose a multiple of 32"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = in_channels
    for stage, widths in enumerate(STAGES, 1):
        for number, channels in enumerate(widths, 1):
            conv = nn.Conv2d(inputs, channels, 3, padding=1)
            layers[f"conv{stage}_{number}"] = activated(conv, nn.BatchNorm2d(channels))
            inputs = channels
        layers[f"conv{stage}_{len(widths)}"].add_module("pool", nn.MaxPool2d(2))
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = activated(nn.Linear(inputs * (image_size // 32) ** 2, 512))
    layers["fc2"] = activated(nn.Linear(512, 512))
    layers["fc3"] = nn.Linear(512, num_classes)
    model = nn.Sequential(layers)
    he_init(model)
    return model
