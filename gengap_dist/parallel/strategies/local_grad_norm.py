"""Norm of a rank's local gradient, for engines that expose gradients only after the reduction over ranks."""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor


@final
class LocalGradNorm:
    """|g|^2 of one backward pass, accumulated by gradient hooks on parameters.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> local_grad_norm = LocalGradNorm()
    >>> local_grad_norm.register_hooks([weight])
    >>> local_grad_norm.start(True)
    >>> (weight * weight).sum().backward()
    >>> local_grad_norm.squared_norm()
    tensor(100., dtype=torch.float64)
    """

    def __init__(self) -> None:
        """Records nothing before `start`."""
        self._enabled = False
        self._squared_norms: list[Tensor] = []
        self._registered: set[int] = set()

    def register_hooks(self, parameters: Iterable[Tensor]) -> None:
        """Add a hook to each of these parameters that has none yet."""
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._registered:
                self._registered.add(id(parameter))
                parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        if self._enabled:
            self._squared_norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())

    def start(self, enabled: bool) -> None:
        """Reset; record the next backward pass if `enabled`."""
        self._enabled = enabled
        self._squared_norms.clear()

    def squared_norm(self) -> Tensor:
        """|g|^2, float64, of the backward pass since `start(True)`; ends the recording."""
        total = torch.stack(self._squared_norms).sum()
        self.start(False)
        return total
