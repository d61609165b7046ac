"""Pictures that stay on the disk until a step asks for them, for folders larger than memory.

Threads read ahead what is expected, while a step computes. What a picture looks like is decided here for both paths:
pictures held in memory are read by the same function.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gengap_dist.errors import UsageError

PREFETCH_BYTES = 2**27  # pictures read ahead and not yet asked for


def read_image(path: str, size: int) -> Tensor:
    """[3, size, size] uint8, resized if it is not of that size.

    Raises:
        UsageError: if the file is no whole picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            # numpy's copy, not torch's: a reading thread must not start torch's threads
            return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UsageError(f"data.root: the picture {path} cannot be read ({error}); replace or remove it") from None


class StreamedImages:
    """N picture files, indexed like the [N, 3, S, S] uint8 tensor that they would make; bit for bit the same pixels.

    One thread may index and expect; the reading is done by `pool`.
    """

    def __init__(self, paths: list[str], size: int, pool: Executor, device: torch.device | None = None) -> None:
        """Pictures S = `size` pixels wide and high; nothing is read yet.

        Args:
            paths: one file per picture.
            size: their side, in pixels.
            pool: threads that read.
            device: where indexing puts them; None: the CPU.
        """
        self.paths, self.size, self.pool, self.device = paths, size, pool, device or torch.device("cpu")
        self.shape = torch.Size([len(paths), 3, size, size])
        self.most_ahead = max(1, PREFETCH_BYTES // (3 * size * size))
        self._coming: deque[int] = deque()
        self._held: dict[int, Future[Tensor]] = {}

    def __len__(self) -> int:
        """N, the number of pictures."""
        return len(self.paths)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """[n, 3, S, S] uint8 pictures of a slice, or of [n] int64 positions.

        Raises:
            UsageError: if a file is damaged.
        """
        wanted = range(len(self))[which] if isinstance(which, slice) else which.tolist()
        reading = [self._take(at) for at in wanted]
        out = torch.empty(len(reading), *self.shape[1:], dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for picture, future in zip(out.numpy(), reading, strict=True):
            picture[:] = future.result()
        self._read_ahead()
        return out.to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Read `indices` [n] ahead, after those expected before and at most PREFETCH_BYTES at any time.

        All of them must be asked for, in this order; others may be asked for in between.
        """
        self._coming.extend(indices.tolist())
        self._read_ahead()

    def subset(self, indices: Tensor) -> "StreamedImages":
        """The pictures at [n] int64 positions."""
        return StreamedImages([self.paths[at] for at in indices.tolist()], self.size, self.pool, self.device)

    def to(self, device: torch.device) -> "StreamedImages":
        """The same pictures, put on a device when they are indexed; nothing is expected of them yet."""
        return StreamedImages(self.paths, self.size, self.pool, device)

    def fingerprint(self, root: Path) -> Iterator[bytes]:
        """Of each picture its path below `root` and its size in bytes."""
        for path in map(Path, self.paths):
            yield f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode()

    def _take(self, at: int) -> "Future[Tensor]":
        if at in self._held:
            return self._held.pop(at)
        if self._coming and self._coming[0] == at:  # more are asked for at once than are read ahead
            self._coming.popleft()
        return self._read(at)

    def _read(self, at: int) -> "Future[Tensor]":
        return self.pool.submit(read_image, self.paths[at], self.size)

    def _read_ahead(self) -> None:
        # a picture that is held already is wanted twice: the second is read once the first was taken
        while self._coming and len(self._held) < self.most_ahead and self._coming[0] not in self._held:
            at = self._coming.popleft()
            self._held[at] = self._read(at)
