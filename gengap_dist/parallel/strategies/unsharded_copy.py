"""An unsharded copy of a model whose parameters are sharded: for probes, evaluation and checkpoints."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn


@final
class UnshardedCopy:
    """A plain copy of a model, kept in CPU memory when not in use."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Copy `model` before it is sharded; `device`: where the copy is used."""
        self._net = copy.deepcopy(model).to("cpu")
        self._device = device

    @contextmanager
    def filled(self, weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[nn.Module]:
        """Context with the copy on its device, with these parameters (by name) and the current buffers of `model`."""
        net = self._net.to(self._device).train(model.training)
        parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
        with torch.no_grad():
            for name, weight in weights:  # one at a time: not all unsharded parameters are in memory twice
                parameters[name].copy_(weight)
            for name, buffer in model.named_buffers():
                buffers[name].copy_(buffer)
        try:
            yield net
        finally:
            net.zero_grad()
            self._net = net.to("cpu")
