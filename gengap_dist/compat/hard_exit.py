"""The end of a process without Python's teardown.

Of a rank, because gloo's threads may still run: about one exit in 25 ended in std::terminate (SIGABRT), and a complete
run failed (torch 2.15; see docs/adr/0075-ranks-end-by-os-exit.md). Of a command that has loaded torch, because Python
takes as long to destroy the objects of torch and its compiler, one by one, as a run of a few steps takes (torch 2.14).

Remove when benchmarks of that record end without SIGABRT (gloo then joins its threads before they are destroyed), and
`python -c "import torch._dynamo"` takes no longer than with `os._exit(0)` at its end.
"""

import atexit
import os
import sys
from typing import Never


def exit_without_teardown(code: int) -> Never:
    """End this process by os._exit after the exit handlers of all packages (Ray, multiprocessing)."""
    atexit._run_exitfuncs()
    hard_exit(code)


def hard_exit(code: int) -> Never:
    """End this process by os._exit. All files must be on disk before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
