"""The contract of a launcher."""

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self

from gengap_dist.config.sections import RunConfig

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words."""


def started_externally() -> bool:
    """Whether torchrun or the deepspeed launcher has started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def hard_exit(code: int) -> Never:
    """End a rank's process at once.

    gloo's threads are not always gone when Python tears down: about one exit in 25 then ends in std::terminate
    (SIGABRT) and fails a run that is complete (torch 2.15; see docs/decisions.md). Everything is on disk by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankFailed(RuntimeError):
    """A rank raised something unforeseen, or died; the message holds its traceback or exit code."""


def load_entry_point(name: str) -> Callable[..., dict[str, Any]]:
    """The function that every rank calls for a run, from `module:function`; imports its module.

    >>> load_entry_point("os.path:join").__name__
    'join'
    """
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class Launcher(ABC):
    """Ranks, ready for one run after another; a context manager that ends the ones it started."""

    def __init__(self, entry_point: str) -> None:
        """Every rank calls `entry_point`, as `module:function`, for a run; launchers know nothing else of runs."""
        self.entry_point = entry_point

    @abstractmethod
    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """One run on all ranks: each calls the entry point.

        Raises:
            UsageError: what a rank found wrong with the config.
            RankFailed: if a rank failed otherwise.
        """

    @abstractmethod
    def close(self, *, kill: bool = False) -> None:
        """End the ranks: ask them, or with `kill` end them at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close(kill=kind is not None)
