"""Augmentation as a function of (seed, epoch, image): the same picture on any rank, micro-batching and restart.

No generator has a state here: the random bits of an image are a hash of its counters (splitmix64's mixer, Steele et
al. 2014). Shapes: n images, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

PADDING = 4  # pixels, the usual CIFAR crop


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The low 64 bits of a whole number, as torch's int64 holds them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def counter_bits(indices: Tensor, *counters: int) -> Tensor:
    """[n] int64, uniform in 0 .. 2^62 - 1, one hash per image.

    Args:
        indices: [n] int64 image numbers.
        counters: seed, epoch, purpose: anything that tells draws apart.
    """
    x = indices
    for counter in counters:
        x = x + _signed((counter + 1) * 0x9E3779B97F4A7C15)  # the golden ratio in 64 bits
        x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _logical_shift(x, 31)
    return _logical_shift(x, 2)


def crop(pixels: Tensor, bits: Tensor) -> Tensor:
    """[n, C, H, W] shifted by up to PADDING pixels each way, with zeros coming in."""
    n, _, height, width = pixels.shape
    offsets = 2 * PADDING + 1
    top, left = bits % offsets, bits // offsets % offsets
    rows = (top[:, None] + torch.arange(height, device=bits.device))[:, :, None]  # [n, H, 1]
    columns = (left[:, None] + torch.arange(width, device=bits.device))[:, None, :]  # [n, 1, W]
    images = torch.arange(n, device=bits.device)[:, None, None]
    return pad(pixels, (PADDING,) * 4).permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2)


def flip(pixels: Tensor, bits: Tensor) -> Tensor:
    """[n, C, H, W] with half of the images mirrored left to right."""
    return torch.where((bits % 2 == 0)[:, None, None, None], pixels.flip(-1), pixels)


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"crop": crop, "flip": flip}


def augment(pixels: Tensor, indices: Tensor, names: tuple[str, ...], seed: int, epoch: int) -> Tensor:
    """[n, C, H, W] uint8 pictures of images `indices`, each augmentation with draws of its own."""
    for name in names:
        purpose = list(AUGMENTATIONS).index(name)
        pixels = AUGMENTATIONS[name](pixels, counter_bits(indices, seed, epoch, purpose))
    return pixels
