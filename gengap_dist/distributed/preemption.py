"""Preemption: a signal handler sets a flag, and the run checks it between steps.

The handler does nothing else: collective work, such as saving a checkpoint, is done at a step boundary, which all ranks
reach.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """A rank received a preemption signal; all ranks saved a checkpoint and stopped before the last step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"preempted after step {step}; checkpoint saved. Continue with --resume.")
        self.step = step


class PreemptionFlag:
    """Whether this process has received a preemption signal; call it to read the flag."""

    def __init__(self) -> None:
        self._is_set = False

    def __call__(self) -> bool:
        """True after the first signal."""
        return self._is_set

    def set(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. Of repeated signals, only a second Ctrl-C from a terminal ends the process."""
        if self._is_set and number == signal.SIGINT and sys.stdin.isatty():
            raise KeyboardInterrupt
        self._is_set = True


@contextmanager
def catching_signals() -> Iterator[PreemptionFlag]:
    """Context in which SIGTERM and SIGINT set the flag instead of ending the process (main thread only)."""
    flag = PreemptionFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.set) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
