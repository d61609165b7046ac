"""The contract between the loop and whatever turns gradients into an update.

The seam is at the micro-step and at the step, never at clipping, backward or optimizer: some engines own those.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gengap_dist.world import World


class Strategy(ABC):
    """One model and its optimizer, trained by all ranks together."""

    def __init__(self, world: World) -> None:
        """A strategy for the ranks of `world`."""
        self.world = world
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.watching = False
        """Whether `local_energy` will be asked for; it costs one pass over the gradients."""

    def setup(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the model, whose weights are equal on all ranks, and its optimizer."""
        self.model, self.optimizer = model, optimizer

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of this rank's images [n, C, H, W]."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Context around forward *and* backward of one micro-batch; gradients meet the other ranks' in the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, whose sum over micro-batches and ranks is the global batch's mean loss."""

    def local_energy(self) -> Tensor:
        """|g|^2, float64, of this rank's own gradient after its first micro-batch, not yet summed over ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).double().square()

    def step(self) -> Tensor:
        """Update the parameters and clear the gradients; the global gradient's 2-norm, a scalar on the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm
