"""Several ranks, each with the whole model: torch's DistributedDataParallel, exact for uneven shards."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.compat.ddp_buffers import no_buffer_sync
from gengap_dist.errors import UsageError
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.strategies.base import BuildOptimizer, Strategy


@final
class DDP(Strategy):
    """Gradients are summed over ranks during the last micro-batch's backward pass."""

    capabilities = CAPABILITIES["ddp"]

    def setup(self, model: nn.Module, build: BuildOptimizer) -> None:
        """See `Strategy.setup`. Collective."""
        super().setup(model, build)
        # DDP wraps the compiled model, not the reverse: torch then splits the graph where a bucket of gradients is
        # full, and the communication hook stays plain Python.
        # Running statistics are averaged before evaluation instead of copied from rank 0 in every forward pass.
        options: dict[str, Any] = {"gradient_as_bucket_view": True} | no_buffer_sync()
        options["find_unused_parameters"] = self.has_unused_parameters  # it costs a walk through the graph in each pass
        self._ddp = DistributedDataParallel(cast("nn.Module", self.net), process_group=self.world.group, **options)
        self._ddp.register_comm_hook(None, self._all_reduce_bucket)
        self._bucket_squared_norms: list[Tensor] = []  # of the buckets reduced in this micro-step

    def _forward(self, inputs: Tensor) -> Tensor:
        try:
            return self._ddp(inputs)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            raise UsageError(
                "some parameters got a gradient in the passes before and none in the last, which launch.strategy=ddp "
                "cannot sum: let every pass use all of them (add 0 * parameter.sum() to the output), or use one rank"
            ) from error

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Collective in the last micro-step: every rank has exactly one."""
        self._bucket_squared_norms.clear()
        self._last_bucket: Any = None
        return nullcontext() if last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`. The time after the last bucket was sent counts as communication."""
        self.execution.scaler.scale(loss).backward()
        if self._last_bucket is not None:
            self.world.timer.charge_since(self._last_bucket, "communication")

    def _all_reduce_bucket(
        self,
        state: None,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        """Sum a bucket's gradients over ranks; DDP itself would compute the mean."""
        if self.track_local_grad_norm:
            self._bucket_squared_norms.append(torch.linalg.vector_norm(bucket.buffer(), dtype=torch.float64).square())
        self.world.timer.enter_collective("sum of gradients")
        self._last_bucket = self.world.timer.now()
        work = dist.all_reduce(bucket.buffer(), group=self.world.group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    def local_squared_grad_norm(self) -> Tensor:
        """See `Strategy.local_squared_grad_norm`; with a single micro-batch it is recorded per bucket."""
        if not self._bucket_squared_norms:
            return super().local_squared_grad_norm()
        unscaled = self.execution.unscaled
        return unscaled(unscaled(torch.stack(self._bucket_squared_norms).sum()))  # twice: it is squared

    def close(self) -> None:
        """See `Strategy.close`: the reducer references `_all_reduce_bucket`, which the garbage collector cannot see."""
        del self._ddp
