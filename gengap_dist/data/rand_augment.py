"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) by the functional operators of torchvision.transforms.v2.

The operators, their magnitudes and their interpolation are those of torchvision's RandAugment. Images with the same
operator and sign are changed together. Shapes: n images, C channels (1 or 3), S x S pixels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from gengap_dist.data.counter_bits import on_device

NUM_MAGNITUDES = 31
ENHANCEMENTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Brightness": functional.adjust_brightness,
    "Color": functional.adjust_saturation,
    "Contrast": lambda images, factor: adjust_contrast(images, factor),
    "Sharpness": functional.adjust_sharpness,
}
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *ENHANCEMENTS)
OPERATORS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")


def rand_augment(images: Tensor, bits: Tensor, magnitude: int) -> Tensor:
    """[n, C, S, S] uint8 images after some operators, one after the other.

    Args:
        images: [n, C, S, S] uint8.
        bits: [2 k, n] int64 on the CPU, from `counter_bits`, for k operators of each image: the first of a pair draws
            one of OPERATORS, the second the sign, if it has one.
        magnitude: 0 to 30, of all operators.
    """
    for for_operator, for_sign in zip(bits[::2], bits[1::2], strict=True):
        codes = 2 * (for_operator % len(OPERATORS)) + for_sign % 2
        order = codes.argsort(stable=True)
        kinds, counts = codes[order].unique_consecutive(return_counts=True)
        device_order = on_device(order, images.device)
        groups = images.index_select(0, device_order).split(counts.tolist())
        changed = [
            apply_operator(group, OPERATORS[code // 2], magnitude, negative=bool(code % 2))
            for group, code in zip(groups, kinds.tolist(), strict=True)
        ]
        images = torch.empty_like(images).index_copy_(0, device_order, torch.cat(changed))
    return images


def apply_operator(images: Tensor, name: str, magnitude: int, *, negative: bool) -> Tensor:
    """[n, C, S, S] uint8 images after one operator at `magnitude` of 30, in the other direction if `negative`.

    At t = magnitude / 30: shear and translation by 0.3 t and 150/331 S t, rotation by 30 t degrees, brightness, color,
    contrast and sharpness times 1 + 0.9 t or 1 - 0.9 t, 8 - round(4 t) bits, solarization from 255 (1 - t).
    """

    def strength(limit: float) -> float:
        """As torchvision has it, in float32: levels are cut off, so that the last digit of a factor can be seen."""
        return float(torch.linspace(0.0, limit, NUM_MAGNITUDES)[magnitude]) * (-1 if negative else 1)

    match name:
        case "ShearX" | "ShearY":
            angle = math.degrees(math.atan(strength(0.3)))
            shear = [angle, 0.0] if name == "ShearX" else [0.0, angle]
            return functional.affine(images, 0.0, [0.0, 0.0], 1.0, shear, center=[0.0, 0.0])
        case "TranslateX" | "TranslateY":
            pixels = float(int(strength(150 / 331 * images.shape[-1])))
            shift = [pixels, 0.0] if name == "TranslateX" else [0.0, pixels]
            return functional.affine(images, 0.0, shift, 1.0, [0.0, 0.0])
        case "Rotate":
            return functional.rotate(images, strength(30.0))
        case "Posterize":
            return functional.posterize(images, 8 - round(4 * magnitude / (NUM_MAGNITUDES - 1)))
        case "Solarize":
            return functional.solarize(images, 255 * float(torch.linspace(1.0, 0.0, NUM_MAGNITUDES)[magnitude]))
        case "AutoContrast":
            return functional.autocontrast(images)
        case "Equalize":
            return functional.equalize(images)
        case _ if name in ENHANCEMENTS:
            return ENHANCEMENTS[name](images, 1 + strength(0.9))
    return images


def adjust_contrast(images: Tensor, factor: float) -> Tensor:
    """`functional.adjust_contrast` with an exact mean of the grey levels.

    torch's sum of many pixels in float32 depends on how many images and threads share the work.
    """
    grey = functional.rgb_to_grayscale(images)
    mean = (grey.sum((-3, -2, -1), keepdim=True).double() / grey[0].numel()).float()
    return images.mul(factor).add_(mean, alpha=1 - factor).clamp_(0, 255).to(torch.uint8)
