"""Builds batches: samples are indexed, augmented and normalised one batch at a time."""

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.augment import augment
from gengap_dist.data.counter_bits import on_device
from gengap_dist.data.datasets import PixelStatistics, Samples
from gengap_dist.data.mixing import draw_mix, is_mixed, mix_images, mix_targets, with_partners


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

    def __init__(
        self,
        samples: Samples,
        preprocess: Preprocess,
        config: DataConfig,
        seed: int,
        num_classes: int | None = None,
    ) -> None:
        """Batches of `samples`, with the augmentations of `config` and random bits from `seed`.

        Mixed images have targets [n, num_classes], the share of each class; `num_classes` is needed for nothing else.
        """
        self.samples, self.preprocess, self.config, self.seed = samples, preprocess, config, seed
        self.is_mixed, self.num_classes = is_mixed(config), num_classes or 0

    def __call__(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [n, ...] each, of the samples `indices` [n], with the augmentation of epoch `epoch`."""
        read = self._read(indices, epoch)
        inputs, targets = self.samples.take(read, self._on_device(read))
        inputs = augment(inputs, read, self.preprocess, self.config, self.seed, epoch)
        if not self.is_mixed:
            return inputs, targets
        height, width = inputs.shape[-2:]
        mix = draw_mix(indices, height, width, self.config, self.seed, epoch)
        mixed = mix_images(inputs[::2], inputs[1::2], mix)
        return mixed, mix_targets(targets[::2], targets[1::2], mix, self.num_classes, inputs.dtype)

    def _read(self, indices: Tensor, epoch: int) -> Tensor:
        """The samples that are read for a batch, in this order: pairs, if images are mixed."""
        return with_partners(indices, len(self.samples), self.seed, epoch) if self.is_mixed else indices

    def plain(self, indices: Tensor) -> Tensor:
        """Inputs [n, ...] of the samples `indices` [n], without augmentation."""
        inputs, _ = self.samples.take(indices, self._on_device(indices))
        return self.preprocess(inputs)

    def _on_device(self, indices: Tensor) -> Tensor:
        """`indices` [n] where the targets are."""
        return on_device(indices, self.samples.targets.device)

    def prefetch(self, indices: Tensor, epoch: int) -> None:
        """Announce the samples `indices` [n] of the next batch, of epoch `epoch`; see `Samples.prefetch`."""
        self.samples.prefetch(self._read(indices, epoch))
