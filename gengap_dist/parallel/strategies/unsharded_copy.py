"""A whole network beside one whose parameters are spread over ranks: to probe, to evaluate, to save."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn


@final
class UnshardedCopy:
    """A plain copy of a network, in the CPU's memory while nobody looks at it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Copy `model` while it is still whole."""
        self._net = copy.deepcopy(model).to("cpu")
        self._device = device

    @contextmanager
    def filled(self, weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[nn.Module]:
        """The copy on its device, with these parameters by name and with the buffers that `model` has now."""
        net = self._net.to(self._device).train(model.training)
        parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
        with torch.no_grad():
            for name, weight in weights:  # one at a time: the whole ones are not all in memory twice
                parameters[name].copy_(weight)
            for name, buffer in model.named_buffers():
                buffers[name].copy_(buffer)
        try:
            yield net
        finally:
            net.zero_grad()
            self._net = net.to("cpu")
