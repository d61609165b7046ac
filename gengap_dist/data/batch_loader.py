"""Builds batches: samples are indexed, augmented and normalised one batch at a time."""

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.augment import augment
from gengap_dist.data.datasets import PixelStatistics, Samples


class Preprocess:
    """Stored inputs to what the network receives: (pixel - mean) / std per channel; other inputs are only converted.

    A token that nothing predicts is stored as its complement, see `token_stream`.
    """

    def __init__(self, pixels: PixelStatistics | None, device: torch.device, dtype: torch.dtype) -> None:
        """Normalise with the statistics `pixels`, if there are any; inputs are on `device`, outputs have `dtype`."""
        self.dtype, self.mean, self.scale = dtype, None, None
        if pixels is not None:
            mean, std = (v.to(device)[:, None, None] for v in pixels)
            self.mean, self.scale = mean.to(dtype), (1 / std).to(dtype)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[n, C, H, W] uint8 to normalised [n, C, H, W], or [n, ...] real numbers, in the training dtype.

        Tokens [n, T] become int64.
        """
        if self.mean is None and not inputs.is_floating_point():
            tokens = inputs.long()
            return torch.where(tokens < 0, ~tokens, tokens)
        if self.mean is None or self.scale is None:
            return inputs.to(self.dtype)
        return inputs.to(self.dtype).sub_(self.mean).mul_(self.scale)


class BatchLoader:
    """Training batches of one data set; `EpochSampler` chooses the indices, `BatchPlan` assigns them to ranks."""

    def __init__(self, samples: Samples, preprocess: Preprocess, config: DataConfig, seed: int) -> None:
        """Batches of `samples`, with the augmentations of `config` and random bits from `seed`."""
        self.samples, self.preprocess, self.config, self.seed = samples, preprocess, config, seed

    def __call__(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [n, ...] each, of the samples `indices` [n], with the augmentation of epoch `epoch`."""
        device_indices = self._on_device(indices)
        inputs, targets = self.samples.take(indices, device_indices)
        return augment(inputs, device_indices, self.preprocess, self.config, self.seed, epoch), targets

    def plain(self, indices: Tensor) -> Tensor:
        """Inputs [n, ...] of the samples `indices` [n], without augmentation."""
        inputs, _ = self.samples.take(indices, self._on_device(indices))
        return self.preprocess(inputs)

    def _on_device(self, indices: Tensor) -> Tensor:
        """`indices` [n] where the targets are."""
        if not self.samples.targets.is_cuda:
            return indices
        # a copy from pageable memory would wait for all work of the GPU
        return indices.pin_memory().to(self.samples.targets.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Announce the samples `indices` [n] of the next batch; see `Samples.prefetch`."""
        self.samples.prefetch(indices)
