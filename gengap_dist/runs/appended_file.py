"""The writer of files that grow by lines, such as metrics.jsonl and system.jsonl.

A process may be killed, or a disk may be full, in the middle of a line. Readers skip an incomplete last line (see
`run_folder.read_from`), and the next append removes it.
"""

import errno
import os
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 4096


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines or nothing, flushed to disk: a later checkpoint must not exist without them.

    Raises:
        OSError: names the file.
    """
    data = lines.encode()
    with path.open("ab+", buffering=0) as file:
        end = _end_of_last_line(file)
        os.ftruncate(file.fileno(), end)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)  # errors of `write` name no file
            os.ftruncate(file.fileno(), end)
            raise


def _end_of_last_line(file: BinaryIO) -> int:
    """The byte after the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        if newline := file.read(end - start).rfind(b"\n") + 1:
            return start + newline
        end = start
    return 0
