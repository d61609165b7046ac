"""Samples of a user's data set that are read during training, since memory does not hold them.

Processes of a DataLoader read what is announced, in this order. What a sample is depends on its position alone, so
nothing depends on how many processes there are, or on what they have read ahead. Shapes: n samples.
"""

import hashlib
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Self, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gengap_dist.compat.daemon_children import allowing_children
from gengap_dist.compat.safe_path import safe_path_variables
from gengap_dist.data.user import READ_SIZE, SampleKind, Source, StreamSource
from gengap_dist.distributed.orphans import end_with
from gengap_dist.distributed.worker_pool import environment_variables
from gengap_dist.errors import UsageError

PREFETCH_BYTES = 2**27  # of samples that are read ahead, at most
CHUNK_SIZE = 1_024  # samples that are checked at a time


class Request(NamedTuple):
    """Samples to read: `positions` in the source number `part`."""

    part: int
    positions: list[int]


Found = tuple[Tensor, Tensor] | str
"""Inputs and targets, [n, ...] each, or what was wrong."""


@final
class _Sources(Dataset[Found]):
    """What a process reads from."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    def __getitem__(self, request: Request) -> tuple[Request, Found]:  # pyright: ignore
        try:
            return request, self.sources[request.part].take(request.positions)
        except UsageError as error:  # torch would pass it on as a text with a traceback
            return request, str(error)


@final
class _Waiting(Sampler[Request]):
    """Requests in the order in which they came. It ends when there are none, and may continue later."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.num_sent = 0

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if not self.requests:
            raise StopIteration
        self.num_sent += 1
        return self.requests.popleft()


def _unchanged(found: tuple[Request, Found]) -> tuple[Request, Found]:
    return found


def worker_context() -> BaseContext:
    """Starts processes as forks of one that has imported torch and nothing else: no threads are copied."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_reader(worker: int) -> None:
    """DataLoader's own watch sees the server of forks, which lives as long as one of them."""
    parent = parent_process()
    assert parent
    end_with(parent.is_alive)


@final
class SampleReader:
    """Reads samples of several sources ahead, by processes that start with the first request.

    All that is announced must be taken later; other samples may be taken in between, and are read by this process.
    """

    def __init__(self, name: str, sources: Sequence[Source], num_workers: int, sample_bytes: int) -> None:
        """`name` is of the data set, for messages; a sample has about `sample_bytes`.

        Raises:
            UsageError: if the sources cannot be sent to a process.
        """
        self._here = _Sources(sources)
        try:
            ForkingPickler.dumps(self._here)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"data.name ({name}) returns a data set that cannot be sent to the processes that read it ({error}): "
                "keep functions and classes at the top of a module, open files in __getitem__, or raise data.memory_gib"
            ) from error
        self._chunk_size = max(1, min(READ_SIZE, PREFETCH_BYTES // (sample_bytes * num_workers * 2)))
        self._name, self._num_workers = name, num_workers
        self.close()

    def close(self) -> None:
        """End the processes; what was announced is forgotten. The next announcement starts others."""
        self._iterator: Iterator[tuple[Request, Found]] | None = None
        self._loader: DataLoader[Any] | None = None  # whose processes end when nobody holds it
        self._waiting = _Waiting()
        self._num_received = 0
        self._expected: Counter[tuple[int, int]] = Counter()
        """How often a sample is announced and not received."""
        self._rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._num_uses: Counter[tuple[int, int]] = Counter()

    def announce(self, part: int, positions: Sequence[int]) -> None:
        """Read samples of `part` after those that were announced before."""
        for start in range(0, len(positions), self._chunk_size):
            self._waiting.requests.append(Request(part, [*positions[start : start + self._chunk_size]]))
        self._expected.update((part, position) for position in positions)
        if self._num_received == self._waiting.num_sent and positions:  # nothing is being read
            self._begin()

    def take(self, part: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets [n, ...] of samples of `part`.

        Raises:
            UsageError: if one cannot be read.
        """
        keys = [(part, position) for position in positions]
        unknown = [position for key, position in zip(keys, positions, strict=True) if not self._is_known(key)]
        if len(unknown) > self._chunk_size:
            self.announce(part, unknown)
        while any(self._expected[key] and key not in self._rows for key in keys):
            self._receive()
        if missing := [key for key in keys if key not in self._rows]:
            found = self._checked(self._here[Request(part, [position for _, position in missing])][1])
            self._keep(missing, found)
        rows = [self._rows[key] for key in keys]
        for key in keys:
            self._num_uses[key] -= 1
            if self._num_uses[key] <= 0:
                del self._num_uses[key]
                self._rows.pop(key, None)
        inputs, targets = (torch.stack([*each]) for each in zip(*rows, strict=True))
        return inputs, targets

    def _is_known(self, key: tuple[int, int]) -> bool:
        return key in self._rows or key in self._expected

    def _begin(self) -> None:
        if self._loader is not None:
            self._iterator = iter(self._loader)
            return
        self._loader = DataLoader(
            self._here,
            sampler=self._waiting,
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_unchanged,  # pyright: ignore[reportArgumentType]  # of a batch, in its types
            persistent_workers=True,
            worker_init_fn=_end_with_reader,
            multiprocessing_context=worker_context(),
            generator=torch.Generator(),  # else it would draw from that of the run
        )
        with allowing_children(), environment_variables(safe_path_variables()):
            self._iterator = iter(self._loader)

    def _receive(self) -> None:
        assert self._iterator is not None
        try:
            request, found = next(self._iterator)
        except StopIteration:  # all that had been sent was received, and more is waiting
            self._begin()
            request, found = next(self._iterator)
        except RuntimeError as error:  # so DataLoader says that a process has ended
            raise UsageError(
                f"a process that reads data.name ({self._name}) has ended ({' '.join(str(error).split())}): if memory "
                f"was short, lower data.workers ({self._num_workers})"
            ) from error
        self._num_received += 1
        keys = [(request.part, position) for position in request.positions]
        for key in keys:
            self._expected[key] -= 1
            if not self._expected[key]:
                del self._expected[key]
        self._keep(keys, self._checked(found))

    def _keep(self, keys: Sequence[tuple[int, int]], found: tuple[Tensor, Tensor]) -> None:
        for key, *row in zip(keys, *found, strict=True):
            self._rows[key] = row[0], row[1]
            self._num_uses[key] += 1

    @staticmethod
    def _checked(found: Found) -> tuple[Tensor, Tensor]:
        if isinstance(found, str):
            raise UsageError(found)
        return found


class ReadInputs:
    """Inputs of N samples, indexed like a tensor [N, ...] of them, with bitwise equal results.

    Of a map-style data set processes read ahead; a stream is read by this process, in its own order.
    """

    def __init__(
        self, reader: "SampleReader | StreamSource", part: int, positions: Tensor, stored: "Stored", device: str = "cpu"
    ) -> None:
        """The samples at `positions` [N] of the source number `part`; results of indexing are on `device`."""
        self.reader, self.part, self.positions = reader, part, positions
        self.stored, self.device = stored, torch.device(device)
        self.shape = torch.Size([len(positions), *stored.shape])

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.positions)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """[n, ...] inputs of a slice, or of [n] int64 indices.

        Raises:
            UsageError: if a sample cannot be read.
        """
        return self._inputs(which, "other")

    def for_training(self, indices: Tensor) -> Tensor:
        """[n, ...] inputs of [n] int64 indices: a stream reads training samples at a place of its own."""
        return self._inputs(indices, "training")

    def _inputs(self, which: slice | Tensor, purpose: str) -> Tensor:
        positions = self.positions[which if isinstance(which, slice) else which.cpu()].tolist()
        if not positions:
            return torch.zeros(0, *self.stored.shape, dtype=self.stored.dtype, device=self.device)
        if isinstance(self.reader, StreamSource):
            inputs, _ = self.reader.take(positions, purpose)
        else:
            inputs, _ = self.reader.take(self.part, positions)
        return self.stored(inputs).to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Announce `indices` [n]: all of them must be indexed later."""
        if isinstance(self.reader, SampleReader):
            self.reader.announce(self.part, self.positions[indices.cpu()].tolist())

    def to(self, device: torch.device) -> Self:
        """The same samples, copied to a device when indexed."""
        return type(self)(self.reader, self.part, self.positions, self.stored, str(device))


class Stored(NamedTuple):
    """How inputs of a source are stored: images with zeros around them, others unchanged."""

    shape: tuple[int, ...]
    """Of one sample."""
    dtype: torch.dtype
    is_image: bool

    @property
    def num_bytes(self) -> int:
        """Memory of one sample."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __call__(self, inputs: Tensor) -> Tensor:
        """[n, H, W] or [n, C, H, W] pixels to [n, C, S, S]."""
        if not self.is_image:
            return inputs
        pixels = inputs if inputs.ndim == 4 else inputs[:, None]
        out = pixels.new_zeros(len(pixels), *self.shape)
        height, width = pixels.shape[2:]
        top, left = (self.shape[1] - height) // 2, (self.shape[2] - width) // 2
        out[:, :, top : top + height, left : left + width] = pixels
        return out


class Part(NamedTuple):
    """One part of a data set in its first pass."""

    name: str
    source: Source
    positions: Tensor
    """[N] int64 of its samples in the source."""
    read: "ReadInputs | None"
    """What reads its inputs during training; None: they are kept in `inputs`."""
    inputs: Tensor
    targets: Tensor


@final
class FirstPass:
    """Reads all samples once before training, checks them, and keeps what is needed of them."""

    def __init__(self, what: str, kind: SampleKind, stored: Stored, progress: Callable[[str, int, int], None]) -> None:
        """`what` they are, for messages; `progress` gets a label, the samples read, and their total."""
        self.what, self.kind, self.stored, self.progress = what, kind, stored, progress
        self.digest = hashlib.blake2b(digest_size=16)
        self.largest_class = self.largest_token = -1

    def begin(self, name: str, source: Source, positions: Tensor, read: "ReadInputs | None") -> Part:
        """The next part, of which nothing is read yet."""
        kind, stored = self.kind, self.stored
        inputs = torch.zeros(len(positions) if read is None else 0, *stored.shape, dtype=stored.dtype)
        targets = torch.zeros(len(positions), *kind.target_shape, dtype=kind.target_dtype)
        return Part(name, source, positions, read, inputs, targets)

    def chunks(self, part: Part) -> Iterator[Tensor]:
        """All inputs of a part, [n, ...] at a time, as the source has them; channels of images are added.

        Raises:
            UsageError: if a sample cannot be read, or is not like the others.
        """
        num, ahead = len(part.positions), part.read.reader if part.read else None
        for start in range(0, num, CHUNK_SIZE):
            positions = part.positions[start : start + CHUNK_SIZE].tolist()
            if isinstance(ahead, SampleReader) and part.read:
                if not start:
                    ahead.announce(part.read.part, positions)
                ahead.announce(part.read.part, part.positions[start + CHUNK_SIZE : start + 2 * CHUNK_SIZE].tolist())
                inputs, targets = ahead.take(part.read.part, positions)
            else:
                inputs, targets = part.source.take(positions)
            self._check(part.name, positions, inputs, targets)
            end = start + len(positions)
            part.targets[start:end] = targets
            stored = self.stored(inputs)
            self.add_to_digest(stored)
            if part.read is None:
                part.inputs[start:end] = stored
            if num > CHUNK_SIZE:
                self.progress(f"reading {part.name} samples", end, num)
            yield inputs if inputs.ndim == 4 else inputs[:, None]

    def add_to_digest(self, values: Tensor) -> None:
        """Add inputs or targets."""
        self.digest.update(np.ascontiguousarray(values.numpy()).data)

    def _check(self, name: str, positions: Sequence[int], inputs: Tensor, targets: Tensor) -> None:
        """Refuse numbers that are not finite, and classes and tokens below 0; one at a position does not count then."""
        what = f"{self.what}: {name}"
        for which, values in (("inputs", inputs), ("targets", targets)):
            if values.is_floating_point() and not values.isfinite().all():
                wrong = values.reshape(len(values), -1).isfinite().all(1).logical_not().nonzero()[0]
                raise UsageError(
                    f"{what}, sample {positions[int(wrong)]}, has {which} that are not finite: replace them"
                )
        if self.kind.is_token:
            self.largest_token = max(self.largest_token, int(inputs.max()))
            if (lowest := int(inputs.min())) < 0:
                raise UsageError(f"{what} has the token {lowest}: number tokens from 0")
        if not targets.is_floating_point():
            self.largest_class = max(self.largest_class, int(targets.max()))
            if not self.kind.target_shape and (lowest := int(targets.min())) < 0:
                raise UsageError(f"{what} has the class {lowest}: number classes from 0")
