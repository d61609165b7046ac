"""Several ranks, each with the whole model: torch's DistributedDataParallel, made exact for uneven shards."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.parallel.strategies.base import BuildOptimizer, Strategy

# Running statistics are averaged before evaluation instead of copied from rank 0 at every forward pass; torch has two
# names for that, by version.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


@final
class DDP(Strategy):
    """Gradients are summed over ranks while the last micro-batch's backward pass runs."""

    needs_warmup_backward = True  # it rebuilds its buckets

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective."""
        super().setup(model, build)
        # Around the compiled network, not under it: torch then cuts the graph where a bucket of gradients is full, and
        # what sums them stays plain Python.
        self._ddp = DistributedDataParallel(
            cast("nn.Module", self.net), gradient_as_bucket_view=True, **_NO_BUFFER_SYNC
        )
        self._ddp.register_comm_hook(None, self._sum)
        self._energies: list[Tensor] = []  # of the buckets that have met the other ranks' in this micro-step

    def _forward(self, images: Tensor) -> Tensor:
        return self._ddp(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step: every rank has exactly one."""
        self._energies.clear()
        self._last_bucket: Any = None
        return nullcontext() if last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`. What comes after the last bucket of gradients has left is waiting for the others."""
        self.scaler.scale(loss).backward()
        if self._last_bucket is not None:
            self.world.timer.charge_since(self._last_bucket, "communication")

    def _sum(
        self,
        state: None,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        """A bucket's gradients summed over ranks, where DDP itself would take the mean."""
        if self.track_local_grad_norm:
            self._energies.append(torch.linalg.vector_norm(bucket.buffer(), dtype=torch.float64).square())
        self.world.timer.enter_collective("sum of gradients")
        self._last_bucket = self.world.timer.now()
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`: of the only micro-batch, the buckets have kept it."""
        if not self._energies:
            return super().local_squared_grad_norm()
        return self.unscaled(self.unscaled(torch.stack(self._energies).sum()))  # it is a square

    def close(self) -> None:
        """See `Strategy.close`: the reducer holds `_sum`, where Python's garbage collector does not look."""
        del self._ddp
