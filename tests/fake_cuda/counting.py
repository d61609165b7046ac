"""What a program does to the GPU: kernels, copies, waits and where they come from."""

import ctypes
import threading
import traceback
from collections import Counter

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy (synchronous)", "sync:")
"""How the names of events begin in which the CPU waits for the GPU."""

_events: Counter[tuple[str, str]] = Counter()  # by kind and place, while counting
_counting = False
_thread = threading.local()


def note(kind: str) -> None:
    """Something happened; it is counted with its place if somebody counts and it is a wait."""
    if _counting and kind.startswith(WAITS) and not getattr(_thread, "busy", False):
        _thread.busy = True  # looking for the place must not count itself
        try:
            _events[kind, place()] += 1
        finally:
            _thread.busy = False


def place(depth: int = 6) -> str:
    """`[FILE:LINE FUNCTION] OURS < ITS CALLER < ...`: the innermost frame, if it is foreign, and gengap_dist's own.

    Autograd's threads have no Python frames.
    """
    frames = [frame for frame in traceback.extract_stack() if "/fake_cuda/" not in frame.filename]
    ours = [frame for frame in frames if "/gengap_dist/" in frame.filename]
    if not frames:
        return "(no Python: a thread of autograd)"
    words = [f"{f.filename.rpartition('/gengap_dist/')[2]}:{f.lineno}({f.name})" for f in reversed(ours[-depth:])]
    last = frames[-1]
    where = last.filename.rpartition("/site-packages/")[2] or last.filename
    theirs = "" if ours and last is ours[-1] else f"[{where}:{last.lineno} {last.name}] "
    return theirs + " < ".join(words)


class Counting:
    """A context in which waits are counted."""

    def __enter__(self) -> "Counting":
        global _counting
        _events.clear()
        _counting = True
        return self

    def __exit__(self, *exc: object) -> None:
        global _counting
        _counting = False
        self._found = Counter(_events)

    def waits(self) -> "Counter[str]":
        """Waits inside, by `KIND @ PLACE`."""
        return Counter({f"{kind} @ {at}": number for (kind, at), number in self._found.items()})


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
def _of_the_runtime(what: bytes, size: int) -> None:
    note(what.decode())


def listen_to_the_runtime() -> None:
    """Have the runtime library, which is preloaded, report what it is asked to do."""
    ctypes.CDLL(None).fake_cuda_callback(_of_the_runtime)
