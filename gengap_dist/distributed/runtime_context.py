"""What a process keeps from run to run, and what it was started as; in place of state of modules.

The main function of a process creates the context, and it is passed down to whoever needs it. A study's ranks execute
many runs with one context.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from gengap_dist.credentials import command_line
from gengap_dist.distributed.cores import Threads

LOOPBACK = "127.0.0.1"  # the MASTER_ADDR of ranks that are all on this machine

Value = TypeVar("Value")


@final
class LastValue(Generic[Value]):
    """Keeps one value, made for the key of the last call: the runs of a study share a data set, but memory holds one.

    >>> squares = LastValue[int]()
    >>> squares.get(3, lambda: 9), squares.get(3, lambda: 0), squares.get(4, lambda: 16), squares.get(3, lambda: 0)
    (9, 9, 16, 0)
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: tuple[object, Value] | None = None

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """The kept value if it was made for an equal key; else forget it, and keep what `make` returns."""
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # its memory is needed for the next one
            self._kept = key, make()
        return self._kept[1]


@final
@dataclass(frozen=True)
class RuntimeContext:
    """A process that executes runs."""

    launcher: str = "local"
    """Name of the launcher of the ranks, for run.json."""
    command: Sequence[str] = field(default_factory=command_line)
    """Command line that started the runs, for run.json; on ranks of other machines, that of the driver."""
    threads: Threads | None = None
    """Threads of a rank, and what limits them; None: as torch has them."""
    on_core_wait: Callable[[str], None] | None = None
    """Called with a sentence when a run waits for a core most of the time, in place of a warning."""
    data: LastValue[Any] = field(default_factory=LastValue)
    """The last data set, by its settings."""


def rank_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment variables of the launcher; (0, 0, 1) without a launcher."""
    read = os.environ.get
    return int(read("RANK", "0")), int(read("LOCAL_RANK", "0")), int(read("WORLD_SIZE", "1"))


def local_size() -> int:
    """Number of ranks on this machine; the world size if the launcher does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or rank_environment()[2])
