"""Starts torch's profiler without kineto's messages about its start, its stop and a missing GPU.

Kineto, torch's tracing library, reads its log level from the environment, once, when the first profiler starts.

Remove when torch's profiler starts silently: a test of this folder then fails.
"""

import os
from typing import Any

LEVEL_VARIABLE = "KINETO_LOG_LEVEL"
QUIET = "99"  # above all levels


def start_quietly(profiler: Any) -> None:
    """Start a torch.profiler.profile; a log level that the user has set is kept."""
    if LEVEL_VARIABLE in os.environ:
        profiler.start()
        return
    os.environ[LEVEL_VARIABLE] = QUIET
    try:
        profiler.start()
    finally:
        del os.environ[LEVEL_VARIABLE]
