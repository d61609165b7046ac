"""Dropout whose draws belong to a sample of a step, not to the rank or the micro-batch that the sample is in."""

import torch
from torch import Tensor, nn

from gengap_dist.data.augment import counter_bits
from gengap_dist.models.sample_position import SamplePosition


class SampleDropout(nn.Dropout):
    """nn.Dropout, drawn from (step, layer, call of it in a pass, position in the global batch, unit)."""

    def __init__(self, p: float, layer: int, position: SamplePosition) -> None:
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
        call = self.position.calls[self.layer] = self.position.calls.get(self.layer, -1) + 1
        draws = counter_bits(counters, *self.position.key, self.layer + (call << 16)) >> 38  # the upper 24 bits
        return input * (draws >= self.p * 2**24).view_as(input) / (1 - self.p if self.p < 1 else 1)


def replace_dropout(model: nn.Module, position: SamplePosition) -> None:
    """Put SampleDropout in the place of every nn.Dropout, in place; dropout of other kinds stays what it is."""
    every = model.named_modules(remove_duplicate=False)  # a layer that goes by two names gets draws for each
    for number, (path, old) in enumerate([(path, old) for path, old in every if type(old) is nn.Dropout]):
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, SampleDropout(old.p, number, position))
