"""A rank ends when the process that started it is gone: nobody would show, upload or restart what it does."""

import os
import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.5


def end_with(is_alive: Callable[[], bool]) -> None:
    """End this process, whatever it is doing, soon after `is_alive` returns False."""

    def watch() -> None:
        while is_alive():
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="orphan", daemon=True).start()
