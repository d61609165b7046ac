"""Output that nobody reads, or cannot be written, ends no training.

Python raises BrokenPipeError where the reader of a pipe has gone (`| head`), and OSError where a terminal was closed
or a disk is full. Where a stream was closed at the start (`>&-`), `sys.stdout` is None, and the next file or socket
that is opened gets its number, so that what libraries and other processes print goes there. (Python 3.11)

Remove when Python can be told to drop such output; there is no such plan.
"""

import io
import os
import sys
from typing import Any


class LastingStream(io.FileIO):
    """A stream that drops what it cannot write."""

    lost: OSError | None = None
    """Why something was dropped, unless the reader has gone."""

    def write(self, data: Any, /) -> int:
        """All of `data` counts as written."""
        try:
            return super().write(data) or len(data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:
            self.lost = error
            return len(data)


def lost_output() -> OSError | None:
    """Why a part of what was printed to stdout could not be written; None if all was, or nobody reads it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    sys.stdout.flush()
    return raw.lost if isinstance(raw, LastingStream) else None


def keep_streams() -> None:
    """Open what is closed of the standard streams, as /dev/null, and drop what cannot be written from now on."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            raw = LastingStream(number, "w", closefd=False)
            lasting = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lasting)
