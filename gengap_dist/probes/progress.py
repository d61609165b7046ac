"""How a measurement says how far it is."""

from collections.abc import Callable

Progress = Callable[[float, float], None]
"""Called after each step with the work done and the total work, in any unit that is proportional to time."""


def no_progress(done: float, total: float) -> None:
    """For measurements that nobody waits for."""
