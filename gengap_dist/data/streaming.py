"""Images that are read from disk during training, for folders larger than memory.

Threads prefetch images during a step.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import torch
from torch import Tensor

from gengap_dist.data.image_folder import read_image

PREFETCH_BYTES = 2**27  # images prefetched and not used yet, in bytes


class StreamedImages:
    """N image files, indexed like an [N, 3, S, S] uint8 tensor of their pixels, with bitwise equal results.

    Not thread-safe: one thread may index and prefetch; `pool` reads the files.
    """

    def __init__(self, paths: list[str], size: int, pool: Executor, device: torch.device | None = None) -> None:
        """Store the paths; no file is read yet.

        Args:
            paths: one file per image.
            size: S, width and height in pixels.
            pool: threads that read files.
            device: of the results of indexing; None: the CPU.
        """
        self.paths, self.size, self.pool, self.device = paths, size, pool, device or torch.device("cpu")
        self.shape = torch.Size([len(paths), 3, size, size])
        self.max_prefetched = max(1, PREFETCH_BYTES // (3 * size * size))
        self._large = threading.Lock()
        self._expected: deque[int] = deque()
        self._prefetched: dict[int, Future[Tensor]] = {}

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.paths)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """[n, 3, S, S] uint8 pixels of a slice, or of [n] int64 positions.

        Raises:
            UsageError: if a file is damaged.
        """
        indices = range(len(self))[which] if isinstance(which, slice) else which.tolist()
        futures = [self._take(index) for index in indices]
        out = torch.empty(len(futures), *self.shape[1:], dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for image, future in zip(out.numpy(), futures, strict=True):
            image[:] = future.result()
        self._read_ahead()
        return out.to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Prefetch `indices` [n] after those of earlier calls, at most PREFETCH_BYTES at any time.

        All of them must be indexed later, in this order; other images may be indexed in between.
        """
        self._expected.extend(indices.tolist())
        self._read_ahead()

    def subset(self, indices: Tensor) -> "StreamedImages":
        """The images at [n] int64 positions."""
        return StreamedImages([self.paths[index] for index in indices.tolist()], self.size, self.pool, self.device)

    def to(self, device: torch.device) -> "StreamedImages":
        """The same images, copied to a device when indexed; nothing is prefetched yet."""
        return StreamedImages(self.paths, self.size, self.pool, device)

    def fingerprint(self, root: Path) -> Iterator[bytes]:
        """For each image, its path relative to `root` and its file size in bytes."""
        for path in map(Path, self.paths):
            yield os.fsencode(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n")

    def _take(self, index: int) -> "Future[Tensor]":
        if index in self._prefetched:
            return self._prefetched.pop(index)
        if self._expected and self._expected[0] == index:  # the batch is larger than max_prefetched
            self._expected.popleft()
        return self._read(index)

    def _read(self, index: int) -> "Future[Tensor]":
        return self.pool.submit(read_image, self.paths[index], self.size, self._large)

    def _read_ahead(self) -> None:
        # an image that is expected twice is read again after its first use
        while (
            self._expected and len(self._prefetched) < self.max_prefetched and self._expected[0] not in self._prefetched
        ):
            index = self._expected.popleft()
            self._prefetched[index] = self._read(index)
