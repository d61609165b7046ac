"""Augmentation as a function of (seed, epoch, image): it does not depend on ranks, micro-batches or restarts.

`mixing` mixes the augmented images. Shapes: n images, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import resized_crop
from gengap_dist.data.counter_bits import counter_bits, on_device

NUM_DRAWS = 3  # one row of bits each for crop, flip and cutout
RESIZED_CROP, RAND_AUGMENT = 100, 200  # the first of their rows
RESIZE_BYTES = 2**19  # of pixels that are enlarged at a time: as float32, in both directions, they then fit a cache


def augment(
    pixels: Tensor, indices: Tensor, preprocess: Callable[[Tensor], Tensor], config: DataConfig, seed: int, epoch: int
) -> Tensor:
    """[n, C, H, W] normalised images after augmentation, in the order of `measures.Augmentation`.

    Every augmentation has its own random bits: its effect does not depend on the others. All but cutout change uint8
    pixels.

    Args:
        pixels: [n, C, H, W] uint8, the pixels of the images `indices`.
        indices: [n] int64 image numbers, on the CPU.
        preprocess: maps pixels to the training dtype; applied before cutout, which sets pixels to the mean (0).
        config: names and parameters of the augmentations.
        seed: of the run.
        epoch: from 0.
    """
    names = config.augment
    if not names:
        return preprocess(pixels)

    def draws(first: int, num: int) -> Tensor:
        return counter_bits(indices, seed, epoch, torch.arange(first, first + num)[:, None])  # [num, n]

    for_crop, for_flip, for_cutout = on_device(draws(0, NUM_DRAWS), pixels.device)
    if "resized_crop" in names:
        bits = draws(RESIZED_CROP, resized_crop.NUM_DRAWS)
        scale, ratio = config.resized_crop_scale, config.resized_crop_ratio
        boxes = resized_crop.crop_boxes(bits, pixels.shape[-1], scale, ratio)
        block = max(1, RESIZE_BYTES // pixels[:1].nbytes)
        parts = zip(pixels.split(block), *(sides.split(block) for sides in boxes), strict=True)
        levels = (resized_crop.resized(part, resized_crop.Boxes(*sides)).round_() for part, *sides in parts)
        pixels = torch.cat([part.to(torch.uint8, memory_format=torch.contiguous_format) for part in levels])
    if "crop" in names or "flip" in names:
        pixels = crop_and_flip(
            pixels,
            for_crop if "crop" in names else torch.zeros_like(for_crop),
            for_flip if "flip" in names else torch.ones_like(for_flip),
            config.crop_padding if "crop" in names else 0,
        )
    if "rand_augment" in names:
        from gengap_dist.data.rand_augment import rand_augment  # torchvision is slow to import

        pixels = rand_augment(pixels, draws(RAND_AUGMENT, 2 * config.rand_augment_ops), config.rand_augment_magnitude)
    inputs = preprocess(pixels)
    return cutout(inputs, for_cutout, config.cutout_size) if "cutout" in names else inputs


def crop_and_flip(pixels: Tensor, for_crop: Tensor, for_flip: Tensor, padding: int) -> Tensor:
    """[n, C, H, W] shifted by up to `padding` pixels with zero padding, then flipped if `for_flip` is even.

    Both are one gather of windows from a padded copy of every image and of its horizontal flip.
    """
    n, channels, height, width = pixels.shape
    padded = pixels.new_zeros(2, n, channels, height + 2 * padding, width + 2 * padding)
    center = padded[..., padding : padding + height, padding : padding + width]
    center[0], center[1] = pixels, pixels.flip(-1)
    num_offsets = 2 * padding + 1
    top, left = for_crop % num_offsets, for_crop // num_offsets % num_offsets
    flipped = for_flip % 2 == 0
    left = torch.where(flipped, 2 * padding - left, left)  # the same window in the flipped image
    _, image_stride, *strides = padded.stride()
    starts = (flipped * n + torch.arange(n, device=pixels.device)) * image_stride + top * strides[1] + left
    window_span = (channels - 1) * strides[0] + (height - 1) * strides[1] + width
    windows = padded.as_strided((padded.numel() - window_span + 1, channels, height, width), (1, *strides))
    return windows.index_select(0, starts)  # copies whole windows: indexing with [] copies single pixels


def cutout(inputs: Tensor, bits: Tensor, size: int) -> Tensor:
    """`inputs` [n, C, H, W] with a square of each set to zero, the mean (DeVries & Taylor 2017). In place.

    The centre of the square is uniform over the image, and the square is clipped at its borders: rows c - size // 2 to
    c - size // 2 + size - 1 for centre c, and columns likewise.
    """
    height, width = inputs.shape[-2:]
    rows = _covered(bits % height, size, height).to(inputs.dtype)
    columns = _covered(bits // height % width, size, width).to(inputs.dtype)
    return inputs.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])  # masked_fill takes 10 times as long


def _covered(centres: Tensor, size: int, side: int) -> Tensor:
    """[n, side] bool: which of `side` pixels an interval of `size` pixels around each centre covers."""
    offsets = torch.arange(side, device=centres.device) - (centres - size // 2)[:, None]
    return (offsets >= 0) & (offsets < size)
