"""Random bits of an image as a hash of its counters: no generator, so no state that depends on ranks or restarts.

The mixer is that of splitmix64 (Steele et al. 2014).
"""

import torch
from torch import Tensor

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The low 64 bits of an integer, as a signed 64-bit integer."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def counter_bits(indices: Tensor, *counters: int | Tensor) -> Tensor:
    """[n] int64, uniform in 0 .. 2^62 - 1, one hash per image.

    Args:
        indices: [n] int64 image numbers.
        counters: numbers that identify the draw (seed, epoch, purpose); [k, 1] int64 gives [k, n], one row each.
    """
    x = indices
    for counter in counters:
        word = counter + 1
        x = x + (_signed(word * GOLDEN_RATIO_64) if isinstance(word, int) else word * _signed(GOLDEN_RATIO_64))
        x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _logical_shift(x, 31)
    return _logical_shift(x, 2)


def uniform(bits: Tensor) -> Tensor:
    """Bits as float64 numbers in the open interval from 0 to 1.

    >>> uniform(torch.tensor([0, 2**61, 2**62 - 1])).tolist()
    [1.1102230246251565e-16, 0.5000000000000001, 0.9999999999999999]
    """
    return ((bits >> 10).double() + 0.5) * 2.0**-52


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a copy from pageable memory would wait for all work of a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
