"""Preemption: a signal handler sets a flag, and the run checks it between steps.

The handler does nothing else: collective work, such as saving a checkpoint, is done at a step boundary, which all ranks
reach. Before and after a run, when there is no step, a signal ends the command at once (`ending_on_signals`).
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gengap_dist.errors import UsageError

TIME_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Of schedulers, closed terminals and limits of processor time."""
SIGNALS = (*TIME_SIGNALS, signal.SIGINT)

Handler = Callable[[int, FrameType | None], Any]


class Preempted(Exception):
    """A rank received a preemption signal; all ranks saved a checkpoint and stopped before the last step."""

    def __init__(self, step: int | None) -> None:
        """`step`: after which the ranks stopped; None: the run was not training, so there was nothing to save."""
        self.what = "preempted before or after training"
        if step is not None:
            self.what = f"preempted after step {step}; checkpoint saved"
        super().__init__(f"{self.what}. Continue with --resume.")
        self.step = step


class PreemptionFlag:
    """Whether this process has received a preemption signal; call it to read the flag."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that has set it; None: it is not set."""

    def __call__(self) -> bool:
        """True after the first signal."""
        return self.number is not None

    def set(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. Of repeated signals, only a second Ctrl-C from a terminal ends the process."""
        if self() and number == signal.SIGINT and sys.stdin.isatty():
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def catching_signals() -> Iterator[PreemptionFlag]:
    """Context in which SIGNALS set the flag instead of ending the process (main thread only).

    One that came when it was too late to stop, so that the work was done all the same, is passed on at the end.
    """
    flag = PreemptionFlag()
    with handling(SIGNALS, flag.set):
        yield flag
    if flag.number is not None:
        signal.raise_signal(flag.number)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Context in which the first of TIME_SIGNALS raises Preempted, as SIGINT raises KeyboardInterrupt.

    A command that already ends with a UsageError is left to clean up: torchrun sends SIGTERM to the ranks whose peer
    failed.
    """
    flag = PreemptionFlag()

    def end(number: int, frame: FrameType | None) -> None:
        if isinstance(error := sys.exc_info()[1], UsageError):
            error.was_told_to_end = True
            return
        if not flag():  # a second one would interrupt what the first has the command clean up
            flag.set(number)
            raise Preempted(None)

    with handling(TIME_SIGNALS, end):
        try:
            yield
        except (UsageError, Preempted):
            raise
        except Exception as error:
            if flag():  # what the signal interrupted failed in its own way, as half an import of torch does
                raise Preempted(None) from error
            raise


@contextmanager
def handling(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Context with a handler of signals (main thread only); see `handle`."""
    is_main = threading.current_thread() is threading.main_thread()
    before = handle(numbers, handler) if is_main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def handle(numbers: Iterable[int], handler: Handler) -> dict[int, Any]:
    """Set a handler of signals, and return those before. Signals that are ignored stay so: `nohup` ignores SIGHUP."""
    own = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # None: not Python's
    return {number: signal.signal(number, handler) for number in own}
