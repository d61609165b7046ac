"""One rank: the loss's gradient is the global batch's already."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import Tensor

from gengap_dist.parallel.strategies.base import Strategy


@final
class Single(Strategy):
    """Plain torch."""

    def _forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Nothing to prepare."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        self.scaler.scale(loss).backward()
