"""Several ranks, each with the whole model: torch's DistributedDataParallel, made exact for uneven shards."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.strategies.base import Strategy

# Running statistics are averaged before evaluation instead of copied from rank 0 at every forward pass; torch has two
# names for that, by version.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


@final
class DDP(Strategy):
    """Gradients are summed over ranks while the last micro-batch's backward pass runs."""

    def setup(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See `Strategy.setup`. Collective."""
        super().setup(model, optimizer)
        self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)

    def forward(self, images: Tensor) -> Tensor:
        """See `Strategy.forward`."""
        return self._ddp(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step: every rank has exactly one."""
        return nullcontext() if last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`. DDP takes the mean over ranks; the factor makes it the sum."""
        (loss * self.world.size).backward()
