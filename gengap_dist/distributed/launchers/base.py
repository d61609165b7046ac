"""The contract of a launcher."""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.worker_pool import RankFailed as RankFailed

Progress = Callable[[int, int, str], None]
"""Called with the number of steps done, the total number of steps, and a short note."""


def started_externally() -> bool:
    """Whether torchrun or the deepspeed launcher has started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def load_entry_point(name: str) -> Callable[..., dict[str, Any]]:
    """Import the function `module:function` that every rank calls for a run.

    >>> load_entry_point("os.path:join").__name__
    'join'
    """
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class Launcher(ABC):
    """Ranks that execute one run after another; a context manager that ends the ranks it started."""

    def __init__(self, entry_point: str) -> None:
        """`entry_point`: the function that every rank calls for a run, as `module:function`."""
        self.entry_point = entry_point

    @abstractmethod
    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """Execute one run: every rank calls the entry point. Returns the result of rank 0.

        Raises:
            UsageError: if a rank rejects the config.
            Preempted: if a rank received a preemption signal.
            RankFailed: if a rank failed for another reason.
        """

    @abstractmethod
    def close(self, *, kill: bool = False) -> None:
        """Stop the ranks in an orderly way, or kill them if `kill` is set."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close(kill=kind is not None)
