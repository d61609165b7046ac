"""The size of a rank's own gradient, where the engine lets nobody see the gradient before it met the other ranks'."""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor


@final
class LocalGradNorm:
    """|g|^2 of one backward pass, summed up by hooks on parameters as their gradients come by.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> energy = LocalGradNorm()
    >>> energy.listen([weight])
    >>> energy.start(True)
    >>> (weight * weight).sum().backward()
    >>> energy.total()
    tensor(100., dtype=torch.float64)
    """

    def __init__(self) -> None:
        """Hears nothing before `start`."""
        self._on = False
        self._parts: list[Tensor] = []
        self._known: set[int] = set()

    def listen(self, parameters: Iterable[Tensor]) -> None:
        """Hear these parameters' gradients; those that are heard already are left as they are."""
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._known:
                self._known.add(id(parameter))
                parameter.register_hook(self._hear)

    def _hear(self, gradient: Tensor) -> None:
        if self._on:
            self._parts.append(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())

    def start(self, on: bool) -> None:
        """Forget what was heard; hear the next backward pass if `on`."""
        self._on = on
        self._parts.clear()

    def total(self) -> Tensor:
        """|g|^2, float64, of the backward pass since `start(True)`; hears no other until the next one."""
        total = torch.stack(self._parts).sum()
        self.start(False)
        return total
