"""Bounds what a web server may answer: requests, which MLflow's client uses, reads for as long as a server sends.

Its timeout is that of a single read, so that a server that sends a byte now and then is never too slow; and it keeps
the whole body in memory, which may be a thousand times what was sent, if that is compressed.

Remove when requests or MLflow has a limit of the size and of the time of an answer.
"""

import io
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

from requests import RequestException, Response
from urllib3.connection import HTTPConnection

MAX_BYTES = 16 << 20  # a page of MLflow's API has up to 3 MiB; parsed, it takes up to twenty times as much memory
MAX_SECONDS = 60.0  # from the first byte to the last


class _BoundedStream(io.RawIOBase):
    """What a server sends, up to MAX_BYTES and for up to MAX_SECONDS."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream, self.num_bytes, self.first = stream, 0, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read once; see io.RawIOBase."""
        number = self.stream.readinto1(buffer)
        self.num_bytes += number
        self.first = self.first or time.monotonic()
        if self.num_bytes > MAX_BYTES:
            raise OSError(f"the answer is larger than {MAX_BYTES >> 20} MiB")
        if time.monotonic() - self.first > MAX_SECONDS:
            raise OSError(f"the answer takes longer than {MAX_SECONDS:g} s")
        return number

    def close(self) -> None:
        self.stream.close()
        super().close()


class _BoundedAnswer(HTTPResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_BoundedStream(self.fp))


def bound_answers() -> None:
    """Bound all answers that this process reads with requests or urllib3 from now on."""
    if HTTPConnection.response_class is _BoundedAnswer:
        return
    HTTPConnection.response_class = _BoundedAnswer
    read = Response.iter_content

    def bounded(self: Response, *args: Any, **kwargs: Any) -> Iterator[Any]:
        num_bytes = 0
        for chunk in read(self, *args, **kwargs):
            num_bytes += len(chunk)
            if num_bytes > MAX_BYTES:
                self.close()
                raise RequestException(f"the answer is larger than {MAX_BYTES >> 20} MiB when it is decompressed")
            yield chunk

    Response.iter_content = bounded
