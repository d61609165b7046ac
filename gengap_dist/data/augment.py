"""Augmentation as a function of (seed, epoch, image): the same picture on any rank, micro-batching and restart.

No generator has a state here: the random bits of an image are a hash of its counters (splitmix64's mixer, Steele et
al. 2014). Shapes: n images, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig

GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits
NUM_DRAWS = 3  # a row of bits each for crop, flip and cutout


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The low 64 bits of a whole number, as torch's int64 holds them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def counter_bits(indices: Tensor, *counters: int | Tensor) -> Tensor:
    """[n] int64, uniform in 0 .. 2^62 - 1, one hash per image.

    Args:
        indices: [n] int64 image numbers.
        counters: seed, epoch, purpose: anything that tells draws apart; [k, 1] int64 gives [k, n], a row for each.
    """
    x = indices
    for counter in counters:
        word = counter + 1
        x = x + (_signed(word * GOLDEN) if isinstance(word, int) else word * _signed(GOLDEN))
        x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _logical_shift(x, 31)
    return _logical_shift(x, 2)


def augment(
    pixels: Tensor, indices: Tensor, normalise: Callable[[Tensor], Tensor], config: DataConfig, seed: int, epoch: int
) -> Tensor:
    """[n, C, H, W] normalised pictures: crop, flip and cutout in this order, whatever order `config` lists them in.

    Every augmentation has draws of its own: what one does is the same with and without the others.

    Args:
        pixels: [n, C, H, W] uint8, the images `indices`.
        indices: [n] int64 image numbers, on the device of `pixels`.
        normalise: takes pixels to the training dtype; comes before cutout, whose grey is the mean's.
        config: which augmentations.
        seed: the run's.
        epoch: from 0.
    """
    names = config.augment
    if not names:
        return normalise(pixels)
    draws = torch.arange(NUM_DRAWS, device=indices.device)[:, None]
    for_crop, for_flip, for_cutout = counter_bits(indices, seed, epoch, draws)
    if "crop" in names or "flip" in names:
        pixels = crop_and_flip(
            pixels,
            for_crop if "crop" in names else torch.zeros_like(indices),
            for_flip if "flip" in names else torch.ones_like(indices),
            config.crop_padding if "crop" in names else 0,
        )
    inputs = normalise(pixels)
    return cutout(inputs, for_cutout, config.cutout_size) if "cutout" in names else inputs


def crop_and_flip(pixels: Tensor, for_crop: Tensor, for_flip: Tensor, padding: int) -> Tensor:
    """[n, C, H, W] shifted by up to `padding` pixels each way, zeros coming in; then mirrored where `for_flip` is even.

    Both are one gather of whole windows, from canvases that hold every picture as it is and mirrored.
    """
    n, channels, height, width = pixels.shape
    canvas = pixels.new_zeros(2, n, channels, height + 2 * padding, width + 2 * padding)
    inner = canvas[..., padding : padding + height, padding : padding + width]
    inner[0], inner[1] = pixels, pixels.flip(-1)
    num_offsets = 2 * padding + 1
    top, left = for_crop % num_offsets, for_crop // num_offsets % num_offsets
    mirrored = for_flip % 2 == 0
    left = torch.where(mirrored, 2 * padding - left, left)  # the window's mirror image, in the mirrored picture
    _, picture, *inside = canvas.stride()
    starts = (mirrored * n + torch.arange(n, device=pixels.device)) * picture + top * inside[1] + left
    reach = (channels - 1) * inside[0] + (height - 1) * inside[1] + width
    windows = canvas.as_strided((canvas.numel() - reach + 1, channels, height, width), (1, *inside))
    return windows.index_select(0, starts)  # copies whole windows: indexing with [] goes pixel by pixel


def cutout(inputs: Tensor, bits: Tensor, size: int) -> Tensor:
    """`inputs` [n, C, H, W], a square of each set to zero, the mean's grey (DeVries & Taylor 2017). In place.

    The square's centre is uniform over the picture, and what lies outside is cut: rows c - size // 2 to
    c - size // 2 + size - 1 of centre c, and columns alike.
    """
    height, width = inputs.shape[-2:]
    rows = _covered(bits % height, size, height).to(inputs.dtype)
    columns = _covered(bits // height % width, size, width).to(inputs.dtype)
    return inputs.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])  # a masked fill costs 10 times as much


def _covered(centres: Tensor, size: int, side: int) -> Tensor:
    """[n, side] bool: which of `side` pixels the stretch of `size` about each centre covers."""
    offsets = torch.arange(side, device=centres.device) - (centres - size // 2)[:, None]
    return (offsets >= 0) & (offsets < size)
