"""From images to batches: indexed, augmented and normalised whole batches at a time."""

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.augment import augment
from gengap_dist.data.datasets import Images, Splits


class Normalise:
    """(pixel - mean) / std per channel, with the training images' own mean and standard deviation."""

    def __init__(self, splits: Splits, device: torch.device, dtype: torch.dtype) -> None:
        """Normalise as `splits` says, on `device`, to `dtype`."""
        mean, std = (v.to(device)[:, None, None] for v in (splits.mean_C, splits.std_C))
        self.mean, self.scale, self.dtype = mean.to(dtype), (1 / std).to(dtype), dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """[n, C, H, W] uint8 to the training dtype."""
        return pixels.to(self.dtype).sub_(self.mean).mul_(self.scale)


class BatchLoader:
    """Training batches of one data set; see `EpochSampler` for which indices and `BatchPlan` for which ranks."""

    def __init__(self, images: Images, normalise: Normalise, config: DataConfig, seed: int) -> None:
        """Batches of `images`, augmented as `config` says under `seed`."""
        self.images, self.normalise, self.config, self.seed = images, normalise, config, seed

    def __call__(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, C, H, W] and labels [n] of the images `indices` as epoch `epoch` sees them."""
        there = indices
        if self.images.labels.is_cuda:  # from pageable memory the copy would wait until the GPU has nothing to do
            there = indices.pin_memory().to(self.images.labels.device, non_blocking=True)
        pixels, labels = self.images.take(indices, there)
        return augment(pixels, there, self.normalise, self.config, self.seed, epoch), labels

    def prefetch(self, indices: Tensor) -> None:
        """Say which images, in which order, are asked for after those expected before; see `Images.expect`."""
        self.images.prefetch(indices)
