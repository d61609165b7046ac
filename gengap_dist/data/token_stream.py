"""A stream of tokens in a memory-mapped file, and the sequences that it is cut into.

A sequence of T tokens has the T tokens one place later as its targets, and the next sequence follows it: every token is
an input once. Documents follow each other without gaps: a sequence may hold the end of one and the beginning of the
next, and attends to both. The first token of a document is no target, and neither is padding: such a token t stands in
the stream as its complement ~t, which is below 0. Shapes: N sequences, T tokens each (`data.context`).
"""

import tempfile
from pathlib import Path
from typing import IO, Self, final

import numpy as np
import torch
from torch import Tensor

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257  # of bytes
CHUNK_SIZE = 2**24  # tokens that are checked at a time


@final
class StreamWriter:
    """Documents as one stream of bytes, each followed by END_OF_DOCUMENT, in a temporary file without a name.

    The sequences stay when it is closed.
    """

    def __init__(self) -> None:
        """An empty stream."""
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        self.num_tokens = 0
        self.num_documents = 0

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; what is mapped stays."""
        self._file.close()

    def add(self, text: bytes) -> None:
        """Append a document of at least one byte."""
        tokens = np.empty(len(text) + 1, dtype=np.int16)
        tokens[:-1] = np.frombuffer(text, dtype=np.uint8)
        tokens[0], tokens[-1] = ~tokens[0], END_OF_DOCUMENT
        self._file.write(tokens.tobytes())
        self.num_tokens += len(tokens)
        self.num_documents += 1

    def sequences(self, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `sequences`, of all that was added; the last sequence is padded."""
        padding = -(self.num_tokens - 1) % context if self.num_tokens else 0
        self._file.write(np.full(padding, ~END_OF_DOCUMENT, dtype=np.int16).tobytes())
        self._file.flush()
        if not self.num_tokens:
            return sequences(torch.zeros(1, dtype=torch.int16), context)
        return sequences(torch.from_numpy(np.memmap(self._file, dtype=np.int16, mode="c")), context)


def sequences(stream: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [N, T] each, of a stream [S]: N = (S - 1) // T; both are views of it.

    >>> inputs, targets = sequences(torch.arange(8), 3)
    >>> inputs.tolist(), targets.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    length = (len(stream) - 1) // context * context
    return stream[:length].view(-1, context), stream[1 : length + 1].view(-1, context)


def read_ids(path: Path, vocab_size: int) -> Tensor:
    """The token ids in a file, [S], memory-mapped, without a copy if its type allows that.

    Args:
        path: a .npy file with one dimension of integers, or a .bin file of uint16, of uint32 if `vocab_size` is above
            65,536, in the byte order of this machine.
        vocab_size: ids are 0 to vocab_size - 1.

    Raises:
        ValueError: if it holds something else.
    """
    if path.suffix == ".npy":
        ids = np.load(path, mmap_mode="c", allow_pickle=False)
    else:
        ids = np.memmap(path, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32, mode="c")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.dtype.isnative:
        raise ValueError(f"it has the shape {list(ids.shape)} and the type {ids.dtype}, not one dimension of integers")
    for start in range(0, len(ids), CHUNK_SIZE):
        chunk = ids[start : start + CHUNK_SIZE]
        for wrong in (chunk.argmin(), chunk.argmax()):
            if not 0 <= chunk[wrong] < vocab_size:
                raise ValueError(
                    f"token {chunk[wrong]} at position {start + wrong:,} is outside of 0 to {vocab_size - 1:,}"
                )
    signed = np.dtype(f"i{ids.dtype.itemsize}")
    if ids.dtype.kind == "u" and vocab_size > np.iinfo(signed).max + 1:
        return torch.from_numpy(ids.astype(np.int32 if vocab_size <= 2**31 else np.int64))
    return torch.from_numpy(ids.view(signed))
