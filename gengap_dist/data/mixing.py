"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

The partner of an image is drawn from the whole training set by a hash of (seed, epoch, image): the two of a pair are
drawn independently, as in the definition of mixup. A partner from the same batch would depend on the batch, which is
what a study varies. Partners are augmented as in their own turn in the epoch. Shapes: n images, C channels, H x W
pixels, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.counter_bits import counter_bits, on_device, uniform

PARTNER, SHARE, KIND, CENTRE = range(3, 7)  # purposes of the draws, after those of `augment`
NAMES = ("mixup", "cutmix")


def is_mixed(config: DataConfig) -> bool:
    """Whether images are mixed.

    >>> is_mixed(DataConfig(augment=("mixup",))), is_mixed(DataConfig(augment=("flip",)))
    (True, False)
    """
    return any(name in config.augment for name in NAMES)


def with_partners(indices: Tensor, num_samples: int, seed: int, epoch: int) -> Tensor:
    """[2n]: each of the images `indices` [n], followed by its partner, of `num_samples` images."""
    partners = counter_bits(indices, seed, epoch, PARTNER) % num_samples
    return torch.stack([indices, partners], 1).flatten()


class Mix(NamedTuple):
    """How the images of a batch are mixed with their partners."""

    share: Tensor
    """[n] float64: lambda, the share of each image itself; of a CutMix, of its pixels that are left."""
    box: Tensor
    """[4, n] int64: top, bottom, left, right of the pixels that are the partner's; empty for a mixup."""
    is_cut: Tensor
    """[n] bool: CutMix, not mixup."""


def draw_mix(indices: Tensor, height: int, width: int, config: DataConfig, seed: int, epoch: int) -> Mix:
    """The mix of the images `indices` [n], each with draws of its own.

    lambda has a Beta(alpha, alpha) distribution. A CutMix replaces a box of sides sqrt(1 - lambda) H and
    sqrt(1 - lambda) W around a uniform centre, cut at the borders; its lambda is then the share of pixels that are
    left. With both mixup and cutmix, half of the images have each.
    """
    for_share, for_kind, for_centre = counter_bits(indices, seed, epoch, torch.tensor([[SHARE], [KIND], [CENTRE]]))
    is_cut = for_kind % 2 == 0
    if not all(name in config.augment for name in NAMES):
        is_cut = torch.full_like(is_cut, "cutmix" in config.augment)
    alphas = torch.tensor([config.mixup_alpha, config.cutmix_alpha], dtype=torch.float64)
    share = _beta_quantile(alphas[is_cut.long()], uniform(for_share))
    half = (0.5 * (1 - share).sqrt())[None] * torch.tensor([[height], [width]])
    half = torch.where(is_cut, half.long(), 0)  # [2, n]
    centre = torch.stack([for_centre % height, for_centre // height % width])
    low, high = (centre - half).clamp(min=0), centre + half
    high = torch.minimum(high, torch.tensor([[height], [width]]))
    left_share = 1 - (high - low).prod(0).double() / (height * width)
    return Mix(torch.where(is_cut, left_share, share), torch.stack([low[0], high[0], low[1], high[1]]), is_cut)


def _beta_quantile(alpha: Tensor, probability: Tensor) -> Tensor:
    """The inverse distribution function of Beta(alpha, alpha): float64 [n].

    >>> _beta_quantile(*torch.tensor([[1.0, 0.2], [0.25, 0.5]], dtype=torch.float64)).tolist()
    [0.25, 0.5]
    """
    from scipy.special import betaincinv  # a slow import, and few runs mix

    return torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), probability.numpy()))


def mix_images(inputs: Tensor, partners: Tensor, mix: Mix) -> Tensor:
    """[n, C, H, W]: lambda x + (1 - lambda) x', lambda one number (mixup), or 0 in a box and 1 outside (CutMix)."""
    device, (height, width) = inputs.device, inputs.shape[-2:]
    top, bottom, left, right = (on_device(side, device)[:, None] for side in mix.box)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    outside = ~(rows[:, :, None] & columns[:, None, :])
    share = on_device(mix.share, device).to(inputs.dtype)[:, None, None]
    weight = torch.where(on_device(mix.is_cut, device)[:, None, None], outside.to(inputs.dtype), share)[:, None]
    return inputs * weight + partners * (1 - weight)


def mix_targets(classes: Tensor, partners: Tensor, mix: Mix, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[n, K]: the share of each class, lambda for that of the image and 1 - lambda for that of its partner."""
    share = on_device(mix.share, classes.device).to(dtype)[:, None]
    of_image, of_partner = (one_hot(each, num_classes).to(dtype) for each in (classes, partners))
    return share * of_image + (1 - share) * of_partner
