"""What a data set gives to a network and expects from it: shapes and kinds of one sample, without its values."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_OUTPUTS = 2**22  # 32 MiB in float64, in which losses are evaluated


@dataclass(frozen=True)
class DataSpec:
    """Shapes are those of one sample, without the sample dimension.

    >>> DataSpec.images(num_classes=10, in_channels=1).zero_inputs(2, torch.float32).shape
    torch.Size([2, 1, 32, 32])
    """

    input_shape: tuple[int, ...]
    """What the network receives: (C, H, W) for an image, (F,) for a row of a table, (T,) for a sequence of tokens."""
    output_shape: tuple[int, ...]
    """What the network returns: (K,) for K classes, (T, K) for a class at each position; else the shape of a target."""
    target_shape: tuple[int, ...] = ()
    """(): one class or one number; (T,): one class at each position."""
    num_classes: int | None = None
    """Targets are classes 0 to num_classes - 1, as int64; None: they are real numbers."""
    is_image: bool = False
    """Inputs are stored as uint8 pixels (0 to 255) and normalised by channel; else they are real numbers, unchanged."""
    token: Literal["byte", "id"] | None = None
    """What an input is a sequence of: bytes and the end of a document, or ids of a user's own tokenizer; both are 0 to
    num_classes - 1, and targets are the next ones. None: inputs are no tokens."""

    @classmethod
    def images(cls, num_classes: int, in_channels: int, image_size: int = 32) -> "DataSpec":
        """Images of image_size x image_size pixels, with one class each."""
        return cls((in_channels, image_size, image_size), (num_classes,), num_classes=num_classes, is_image=True)

    @classmethod
    def tokens(cls, vocab_size: int, context: int, token: Literal["byte", "id"] = "id") -> "DataSpec":
        """Sequences of `context` tokens, each with the next one as its target."""
        return cls((context,), (context, vocab_size), (context,), num_classes=vocab_size, token=token)

    def block_size(self, largest: int) -> int:
        """Samples that pass through a network together, at most `largest`: their outputs are at most MAX_OUTPUTS.

        >>> DataSpec.images(10, 1).block_size(250), DataSpec.tokens(50_257, 64).block_size(250)
        (250, 1)
        """
        return max(1, min(largest, MAX_OUTPUTS // math.prod(self.output_shape)))

    def zero_inputs(self, num: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """`num` inputs of zeros, as the network receives them: [num, *input_shape], of `dtype`; tokens are int64."""
        return torch.zeros(num, *self.input_shape, dtype=torch.int64 if self.token else dtype, device=device)

    def zero_targets(self, num: int, device: torch.device | str = "cpu") -> Tensor:
        """`num` targets of zeros: [num, *target_shape], int64 for classes, else float32."""
        dtype = torch.float32 if self.num_classes is None else torch.int64
        return torch.zeros(num, *self.target_shape, dtype=dtype, device=device)

    def random_inputs(self, num: int) -> Tensor:
        """`num` random inputs as they are stored: pixels, tokens, or normal numbers. [num, *input_shape]."""
        if self.token and self.num_classes:
            return torch.randint(self.num_classes, (num, *self.input_shape))
        if self.is_image:
            return torch.randint(256, (num, *self.input_shape), dtype=torch.uint8)
        return torch.randn(num, *self.input_shape)
