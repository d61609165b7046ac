"""Batch norm, and what about it depends on how a global batch is cut."""

import torch
from torch import Tensor, nn

from gengap_dist.world import World


class GhostBatchNorm1d(nn.BatchNorm1d):
    """Batch norm over groups of `ghost_size` consecutive samples (Hoffer et al. 2017).

    `BatchPlan` never cuts a group, so the training statistics do not depend on world size or micro-batches.
    """

    def __init__(self, num_features: int, ghost_size: int) -> None:
        """Like nn.BatchNorm1d(num_features), per group."""
        super().__init__(num_features)
        self.ghost_size = ghost_size

    def forward(self, input: Tensor) -> Tensor:
        """[n, num_features] to the same shape; the last group may be smaller."""
        if not self.training:
            return super().forward(input)
        normed = super().forward  # bound here: a comprehension cannot use the bare super()
        return torch.cat([normed(group) for group in input.split(self.ghost_size)])


def batch_norm(num_features: int, ghost_size: int | None) -> nn.BatchNorm1d:
    """Plain batch norm, or ghost batch norm when a group size is given."""
    return nn.BatchNorm1d(num_features) if ghost_size is None else GhostBatchNorm1d(num_features, ghost_size)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer takes statistics over the samples of a batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@torch.no_grad()
def average_buffers(model: nn.Module, world: World) -> None:
    """Make floating-point buffers (running statistics) their mean over ranks. Collective.

    Each rank's batch norm sees its own samples, so the running statistics drift apart; evaluation and saving need one.
    """
    buffers = [b for b in model.buffers() if b.is_floating_point()] if world.size > 1 else []
    if buffers:
        flat = torch.cat([b.flatten() for b in buffers])
        mean = world.sum(flat) / world.size
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
