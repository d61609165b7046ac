"""Lets a rank, which is a daemon of multiprocessing, have processes that read data (Python 3.11, torch 2.14).

multiprocessing refuses children of daemons, because it would not end them. Those of a DataLoader end by themselves when
their parent does.

Remove when multiprocessing allows them, or ranks are no daemons.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from typing import Any


@contextmanager
def allowing_children() -> Iterator[None]:
    """Context in which this process may start processes of multiprocessing."""
    config: dict[str, Any] = current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    before = config.get("daemon")
    config["daemon"] = False
    try:
        yield
    finally:
        config["daemon"] = before
