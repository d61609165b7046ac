"""From images in memory to batches: indexed, augmented and normalised whole batches at a time."""

import torch
from torch import Tensor

from gengap_dist.data.augment import augment
from gengap_dist.data.catalog import Images


class Normalise:
    """(pixel - mean) / std per channel, with the mean and standard deviation of the training images."""

    def __init__(self, train: Images, dtype: torch.dtype) -> None:
        """Statistics over all pixels of `train`; exact, because they come from 256-bin counts."""
        channels = train.pixels.unbind(1)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in channels]).double()  # [C, 256]
        levels = torch.arange(256, dtype=torch.float64, device=counts.device)
        total = counts.sum(1)
        mean = counts @ levels / total
        std = (counts @ levels.square() / total - mean.square()).clamp_min(0).sqrt().clamp_min(1.0)
        self.mean, self.scale = (v.to(dtype)[:, None, None] for v in (mean, 1 / std))
        self.dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """[n, C, H, W] uint8 to the training dtype."""
        return pixels.to(self.dtype).sub_(self.mean).mul_(self.scale)


class Batches:
    """Training batches of one data set; see `Order` for which indices and `BatchPlan` for which ranks."""

    def __init__(self, images: Images, normalise: Normalise, augmentations: tuple[str, ...], seed: int) -> None:
        """Batches of `images`, augmented under `seed`."""
        self.images, self.normalise, self.augmentations, self.seed = images, normalise, augmentations, seed

    def __call__(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, C, H, W] and labels [n] of the images `indices` as epoch `epoch` sees them."""
        indices = indices.to(self.images.labels.device)
        pixels = self.images.pixels[indices]
        pixels = augment(pixels, indices, self.augmentations, self.seed, epoch)
        return self.normalise(pixels), self.images.labels[indices]
