"""Dropout whose draws belong to a sample of a step, not to the rank or the micro-batch that the sample is in."""

import torch
from torch import Tensor, nn

from gengap_dist.data.augment import counter_bits
from gengap_dist.models.position import Position


class SampleDropout(nn.Dropout):
    """nn.Dropout, drawn from (step, layer, position in the global batch, unit)."""

    def __init__(self, p: float, layer: int, position: Position) -> None:
        """Drop units with probability p; `layer` tells this layer's draws from others'."""
        super().__init__(p)
        self.layer, self.position = layer, position

    def forward(self, input: Tensor) -> Tensor:
        """[n, ...] to the same shape."""
        if not self.training or not self.p:
            return input
        units = input[0].numel() if len(input) else 0
        first = self.position.start * units
        counters = torch.arange(first, first + input.numel(), device=input.device)
        draws = counter_bits(counters, *self.position.key, self.layer) >> 38  # the upper 24 bits
        return input * (draws >= self.p * 2**24).view_as(input) / (1 - self.p)


def treat_dropout(model: nn.Module, position: Position) -> None:
    """Put SampleDropout in the place of every nn.Dropout, in place; dropout of other kinds stays what it is."""
    found = [(path, old) for path, old in model.named_modules() if type(old) is nn.Dropout]
    for number, (path, old) in enumerate(found):
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, SampleDropout(old.p, number, position))
