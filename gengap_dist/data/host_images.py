"""Images that stay in the machine's memory while a GPU trains on them, for data sets larger than a GPU's memory.

A thread gathers what is expected into pinned memory, while a step computes; the copy from there to the GPU does not
hold up the CPU. The data set itself is not pinned: memory that the system may not move is scarce, and only what is
copied needs it.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PREFETCH_BYTES = (
    2**28
)  # of images gathered ahead for one step; the rest of a larger step is gathered when it is asked for
MAX_PREFETCHED = 4  # steps that are kept ready; a loop that asks for other images than it said leaves some behind


class _Prefetched:
    """The images of a step, of which the first are being gathered."""

    def __init__(self, indices: Tensor, gathered: "Future[Tensor]", num_gathered: int) -> None:
        self.indices, self.gathered, self.num_gathered = indices, gathered, num_gathered
        self.num_taken = 0

    def next(self, num: int) -> Tensor:
        """Which images come next, if so many are asked for."""
        return self.indices[self.num_taken : self.num_taken + num]


class HostImages:
    """N images in the machine's memory, indexed like the [N, C, H, W] uint8 tensor that they are; results on a device.

    One thread may index and expect.
    """

    def __init__(self, pixels: Tensor, device: torch.device) -> None:
        """Images `pixels` [N, C, H, W] uint8, on the CPU, for `device`."""
        self.pixels, self.device, self.shape = pixels, device, pixels.shape
        self._most_ahead = max(1, PREFETCH_BYTES // pixels[:1].numel())
        self._expected: deque[_Prefetched] = deque(maxlen=MAX_PREFETCHED)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="images")

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.pixels)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """[n, C, H, W] uint8 images of a slice, or of [n] int64 positions, on the device."""
        indices = torch.arange(len(self))[which] if isinstance(which, slice) else which.cpu()
        return self._host(indices).to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Gather `indices` [n] ahead: they are asked for, in this order, after those expected before."""
        if not len(indices):
            return
        first = indices[: self._most_ahead]
        self._expected.append(_Prefetched(indices, self._pool.submit(self._gather, first), len(first)))

    def _host(self, indices: Tensor) -> Tensor:
        """The images in pinned memory: those expected next, or gathered now."""
        size = len(indices)
        at = next((n for n, step in enumerate(self._expected) if torch.equal(step.next(size), indices)), None)
        if at is None:
            return self._gather(indices)
        for _ in range(at):  # nobody asked for these
            self._expected.popleft()
        head = self._expected[0]
        start, head.num_taken = head.num_taken, head.num_taken + size
        if head.num_taken == len(head.indices):
            self._expected.popleft()
        ready = head.num_taken <= head.num_gathered
        return head.gathered.result()[start : head.num_taken] if ready else self._gather(indices)

    def _gather(self, indices: Tensor) -> Tensor:
        """By numpy: a second thread must not start torch's own threads again."""
        out = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(self.pixels.numpy(), indices.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" copies twice
        return out
