"""One rank: its gradient is already that of the global batch."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import Tensor

from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.strategies.base import Strategy


@final
class Single(Strategy):
    """Plain torch without collectives."""

    capabilities = CAPABILITIES["single"]

    def _forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Does nothing."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        self.execution.scaler.scale(loss).backward()
