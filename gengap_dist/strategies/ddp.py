"""Several ranks, each with the whole model: torch's DistributedDataParallel, made exact for uneven shards."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.strategies.base import Strategy


@final
class DDP(Strategy):
    """Gradients are summed over ranks while the last micro-batch's backward pass runs."""

    def setup(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See `Strategy.setup`. Collective."""
        super().setup(model, optimizer)
        self._ddp = DistributedDataParallel(
            model,
            broadcast_buffers=False,  # running statistics are averaged before evaluation instead
            gradient_as_bucket_view=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        """See `Strategy.forward`."""
        return self._ddp(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step: every rank has exactly one."""
        return nullcontext() if last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`. DDP takes the mean over ranks; the factor makes it the sum."""
        (loss * self.world.size).backward()
