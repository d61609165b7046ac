"""The residual networks for CIFAR of He et al. 2016, section 4.2: 6n + 2 layers with shortcuts of no parameters."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import pad

from gengap_dist.models.blocks import activated, he_init


class Block(nn.Module):
    """act(norm(conv(unit(x))) + shortcut(x)); its output is the layer `act`.

    Option A: where the block halves the image and widens it, the shortcut takes every other pixel and adds channels of
    zeros.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        """A block that widens, inputs < channels, has stride 2."""
        super().__init__()
        self.stride, self.more = 1 + (inputs < channels), channels - inputs
        conv = nn.Conv2d(inputs, channels, 3, self.stride, padding=1, bias=False)
        self.conv1 = activated(conv, nn.BatchNorm2d(channels))
        self.conv2 = nn.Sequential(
            OrderedDict(affine=nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm=nn.BatchNorm2d(channels))
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, H, W] to [n, channels, ceil(H / stride), ceil(W / stride)]."""
        shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more)) if self.more else x
        return self.act(self.conv2(self.conv1(x)) + shortcut)


class ResNet(nn.Module):
    """conv1, then stages of 16, 32 and 64 channels, the mean over the image, and the classifier `head`."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        """With `blocks` blocks in each stage: n of 6n + 2."""
        super().__init__()
        self.conv1 = activated(nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(*[Block(inputs if number == 0 else channels, channels) for number in range(blocks)])
            for inputs, channels in [(16, 16), (16, 32), (32, 64)]
        )
        self.head = nn.Linear(64, num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, H, W] to [n, num_classes]."""
        return self.head(self.stage3(self.stage2(self.stage1(self.conv1(images)))).mean((2, 3)))


def resnet(depth: int, *, num_classes: int, in_channels: int) -> ResNet:
    """ResNet of depth 6n + 2 for images of any size: 269,722 parameters at depth 20 on 3 channels with 10 classes.

    >>> sum(p.numel() for p in resnet(56, num_classes=10, in_channels=3).parameters())
    853018
    """
    return ResNet((depth - 2) // 6, num_classes, in_channels)
