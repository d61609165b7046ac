"""Builds batches: images are indexed, augmented and normalised one batch at a time."""

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.augment import augment
from gengap_dist.data.datasets import Images, Splits


class Normalise:
    """(pixel - mean) / std per channel, with mean and standard deviation of the training images."""

    def __init__(self, splits: Splits, device: torch.device, dtype: torch.dtype) -> None:
        """Use the mean and standard deviation of `splits`; inputs are on `device`, outputs have `dtype`."""
        mean, std = (v.to(device)[:, None, None] for v in (splits.mean_C, splits.std_C))
        self.mean, self.scale, self.dtype = mean.to(dtype), (1 / std).to(dtype), dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """[n, C, H, W] uint8 to normalised [n, C, H, W] of the training dtype."""
        return pixels.to(self.dtype).sub_(self.mean).mul_(self.scale)


class BatchLoader:
    """Training batches of one data set; `EpochSampler` chooses the indices, `BatchPlan` assigns them to ranks."""

    def __init__(self, images: Images, normalise: Normalise, config: DataConfig, seed: int) -> None:
        """Batches of `images`, with the augmentations of `config` and random bits from `seed`."""
        self.images, self.normalise, self.config, self.seed = images, normalise, config, seed

    def __call__(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, C, H, W] and labels [n] of the images `indices`, with the augmentation of epoch `epoch`."""
        device_indices = indices
        if self.images.labels.is_cuda:  # a copy from pageable memory would wait for all work of the GPU
            device_indices = indices.pin_memory().to(self.images.labels.device, non_blocking=True)
        pixels, labels = self.images.take(indices, device_indices)
        return augment(pixels, device_indices, self.normalise, self.config, self.seed, epoch), labels

    def prefetch(self, indices: Tensor) -> None:
        """Announce the images `indices` [n] of the next batch; see `Images.prefetch`."""
        self.images.prefetch(indices)
