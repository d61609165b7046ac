"""torchrun sets OMP_NUM_THREADS=1 for several ranks on a machine, whatever the number of cores (torch 2.11 to 2.15).

The ranks cannot tell this from a 1 that the user has set, but the environment in which the agent was started can.

Remove when torchrun divides the cores among its ranks, or leaves the variable alone.
"""

import os
from pathlib import Path


def set_by_torchrun() -> bool:
    """Whether OMP_NUM_THREADS of this process comes from torchrun; False if that cannot be known."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        agent = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in agent.split(b"\0"))
