"""The end of a rank's process without Python's teardown, during which gloo's threads may still run.

About one exit in 25 then ended in std::terminate (SIGABRT), and a complete run failed (torch 2.15; see
docs/adr/0075-ranks-end-by-os-exit.md).

Remove when benchmarks of that record end without SIGABRT: gloo then joins its threads before they are destroyed.
"""

import os
import sys
from typing import Never


def hard_exit(code: int) -> Never:
    """End this process by os._exit. All files must be on disk before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
