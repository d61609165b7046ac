"""LeNet-5 (LeCun et al. 1998) as it is used today: ReLU, max pooling, a plain linear classifier."""

from torch import Tensor, nn

from gengap_dist.errors import UsageError
from gengap_dist.models.blocks import activated


class LeNet5(nn.Module):
    """Two convolutions with pooling, then 120, 84 and num_classes units."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, activation: str) -> None:
        """Weights as torch initialises them."""
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise UsageError(f"data.image_size ({image_size}) is too small for lenet5: choose at least 16")
        self.conv1 = activated(nn.Conv2d(in_channels, 6, 5), activation=activation, pool=nn.MaxPool2d(2))
        self.conv2 = activated(nn.Conv2d(6, 16, 5), activation=activation, pool=nn.MaxPool2d(2))
        self.fc1 = activated(nn.Linear(16 * side * side, 120), activation=activation)
        self.fc2 = activated(nn.Linear(120, 84), activation=activation)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, image_size, image_size] to [n, num_classes]."""
        features = self.conv2(self.conv1(images)).flatten(1)
        return self.fc3(self.fc2(self.fc1(features)))


def lenet5(*, num_classes: int, in_channels: int, image_size: int = 32, activation: str = "relu") -> LeNet5:
    """LeNet-5 for images of any size from 16; 61,706 parameters on 32 x 32 x 1 with 10 classes.

    Its linear variant keeps the max pooling, so it is a control without ReLU, not a linear map of the image.
    """
    return LeNet5(num_classes, in_channels, image_size, activation)
