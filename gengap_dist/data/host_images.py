"""Images kept in host memory during training on a GPU, for data sets larger than GPU memory.

A thread gathers the next images into pinned memory during the current step; the copy from there to the GPU does not
block the CPU. The data set itself is not pinned: pinned memory is scarce, and only copied images need it.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PREFETCH_BYTES = 2**28  # images prefetched for one step, in bytes; the rest of a larger step is gathered on demand
MAX_PREFETCHED = 4  # prefetched steps kept; steps that were announced but never read are dropped


class _Prefetched:
    """The indices of a step; the pixels of the first `num_gathered` are being gathered."""

    def __init__(self, indices: Tensor, gathered: "Future[Tensor]", num_gathered: int) -> None:
        self.indices, self.gathered, self.num_gathered = indices, gathered, num_gathered
        self.num_taken = 0

    def next(self, num: int) -> Tensor:
        """Indices of the next `num` images that were not taken yet."""
        return self.indices[self.num_taken : self.num_taken + num]


class HostImages:
    """N images in host memory, indexed like an [N, C, H, W] uint8 tensor; results are on a device.

    Inputs of other kinds, tokens and real numbers, keep their shape and type.

    Not thread-safe: one thread may index and prefetch.
    """

    def __init__(self, pixels: Tensor, device: torch.device) -> None:
        """Images `pixels` [N, C, H, W] uint8 on the CPU; indexing copies to `device`."""
        self.pixels, self.device, self.shape = pixels, device, pixels.shape
        self._max_prefetched = max(1, PREFETCH_BYTES // pixels[:1].nbytes)
        self._prefetched: deque[_Prefetched] = deque(maxlen=MAX_PREFETCHED)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="images")

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.pixels)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """[n, C, H, W] uint8 images of a slice, or of [n] int64 positions, on the device."""
        indices = torch.arange(len(self))[which] if isinstance(which, slice) else which.cpu()
        return self._host(indices).to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Start to gather `indices` [n]; they must be indexed in this order, after those of earlier calls."""
        if not len(indices):
            return
        first = indices[: self._max_prefetched]
        self._prefetched.append(_Prefetched(indices, self._pool.submit(self._gather, first), len(first)))

    def _host(self, indices: Tensor) -> Tensor:
        """Images `indices` in pinned host memory: prefetched, or gathered now."""
        size = len(indices)
        position = next((n for n, step in enumerate(self._prefetched) if torch.equal(step.next(size), indices)), None)
        if position is None:
            return self._gather(indices)
        for _ in range(position):  # these were not used
            self._prefetched.popleft()
        head = self._prefetched[0]
        start, head.num_taken = head.num_taken, head.num_taken + size
        if head.num_taken == len(head.indices):
            self._prefetched.popleft()
        is_prefetched = head.num_taken <= head.num_gathered
        return head.gathered.result()[start : head.num_taken] if is_prefetched else self._gather(indices)

    def _gather(self, indices: Tensor) -> Tensor:
        """Gather with numpy: torch would start its threads again in a second thread."""
        out = torch.empty(len(indices), *self.shape[1:], dtype=self.pixels.dtype, pin_memory=self.device.type == "cuda")
        np.take(self.pixels.numpy(), indices.numpy(), axis=0, out=out.numpy(), mode="clip")  # mode="raise" copies twice
        return out
