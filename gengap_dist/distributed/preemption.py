"""Being asked to leave: a signal sets a flag, and the run looks at it between steps.

A handler does nothing else: whatever ranks must do together, they do at a step boundary, where all of them are.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """All ranks have saved and left before the last step, because one of them was asked to."""

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to leave after step {step}; saved, --resume goes on")
        self.step = step


class PreemptionFlag:
    """Whether this process has been asked to leave; call it to know."""

    def __init__(self) -> None:
        self._given = False

    def __call__(self) -> bool:
        """True from the first signal on."""
        return self._given

    def set(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second Ctrl-C from a terminal ends the process; schedulers may repeat themselves."""
        if self._given and number == signal.SIGINT and sys.stdin.isatty():
            raise KeyboardInterrupt
        self._given = True


@contextmanager
def catching_signals() -> Iterator[PreemptionFlag]:
    """While open, SIGTERM and SIGINT set the notice instead of ending the process (from the main thread only)."""
    notice = PreemptionFlag()
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    before = {number: signal.signal(number, notice.set) for number in SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
