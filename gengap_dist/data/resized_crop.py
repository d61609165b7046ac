"""Random resized crops (the crop of Inception, Szegedy et al. 2015, arXiv 1409.4842), many images at a time.

Shapes: n images, C channels, S x S pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gengap_dist.data.counter_bits import on_device, uniform

NUM_ATTEMPTS = 10
NUM_DRAWS = 2 * NUM_ATTEMPTS + 2  # rows of bits


class Boxes(NamedTuple):
    """[n] int64 each: the first row and column of the crop of each image, its height and its width."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def crop_boxes(bits: Tensor, side: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Boxes:
    """The crop of each image, as torchvision's RandomResizedCrop draws it.

    Area share a uniform in `scale`, width / height r with log r uniform in the logarithms of `ratio`: the crop is
    round(S sqrt(a r)) wide and round(S sqrt(a / r)) high, at a uniform place. A crop that is larger than the image is
    drawn again; after ten times it is the largest crop in the middle whose ratio is in `ratio`.

    Args:
        bits: [NUM_DRAWS, n] int64, from `counter_bits`.
        side: S, of the images.
        scale: smallest and largest share of the area.
        ratio: smallest and largest ratio of width to height.

    >>> whole = crop_boxes(torch.zeros(NUM_DRAWS, 1, dtype=torch.int64), 8, (1.0, 1.0), (1.0, 1.0))
    >>> [int(part) for part in whole]
    [0, 0, 8, 8]
    """
    areas, ratios = uniform(bits[:NUM_ATTEMPTS]), uniform(bits[NUM_ATTEMPTS : 2 * NUM_ATTEMPTS])
    areas = side**2 * (scale[0] + (scale[1] - scale[0]) * areas)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = torch.exp(low + (high - low) * ratios)
    widths, heights = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    first = fits.long().argmax(0, keepdim=True)  # of equal ones the first
    any_fits = fits.any(0)
    width_if_none, height_if_none = round(side * min(1.0, ratio[1])), round(side / max(1.0, ratio[0]))
    width = torch.where(any_fits, widths.gather(0, first)[0], width_if_none)
    height = torch.where(any_fits, heights.gather(0, first)[0], height_if_none)
    for_top, for_left = bits[-2:]
    top = torch.where(any_fits, for_top % (side - height + 1), (side - height) // 2)
    left = torch.where(any_fits, for_left % (side - width + 1), (side - width) // 2)
    return Boxes(top, left, height, width)


def resized(images: Tensor, boxes: Boxes) -> Tensor:
    """The crops of [n, C, S, S] images, enlarged to S x S by bilinear interpolation: float32.

    Output pixel o of S is at x = (o + 1/2) h / S - 1/2 of a crop of h pixels, between its pixels floor(x) and
    floor(x) + 1. A crop is never larger than the result, so there is nothing to smooth (antialiasing).
    """
    side, device = images.shape[-1], images.device
    top, left, height, width = (on_device(part, device) for part in boxes)
    rows = _along_rows(images.float(), *_neighbours(top, height, side))
    return _along_rows(rows.transpose(2, 3).contiguous(), *_neighbours(left, width, side)).transpose(2, 3)


def _neighbours(start: Tensor, length: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """[n, S] each: the two pixels between which each of S output pixels is, and the weight of the second."""
    outputs = torch.arange(side, dtype=torch.float64, device=start.device) + 0.5
    at = (outputs * (length[:, None] / side) - 0.5).clamp(min=0)
    first = at.long()
    second = torch.minimum(first + 1, length[:, None] - 1)
    return start[:, None] + first, start[:, None] + second, (at - first).float()


def _along_rows(images: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Rows of [n, C, S, S] images between their rows `first` and `second` [n, S]. Copies whole rows, which is fast."""
    n, channels, side, _ = images.shape
    starts = (torch.arange(n * channels, device=images.device) * side).view(n, channels, 1)
    rows = images.view(-1, side)
    one, two = (rows.index_select(0, (starts + at[:, None]).flatten()) for at in (first, second))
    return torch.lerp(one, two, weight[:, None].expand(n, channels, side).reshape(-1, 1)).view(images.shape)
