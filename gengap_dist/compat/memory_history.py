"""Recording of the allocations on a GPU, for pytorch.org/memory_viz; its documented functions have private names.

Remove when torch.cuda.memory has public names for them.
"""

from pathlib import Path

import torch


def record_allocations(max_entries: int) -> None:
    """Record the latest allocations on this process's GPU, each with its Python stack."""
    torch.cuda.memory._record_memory_history(max_entries=max_entries, stacks="python")


def stop_recording() -> None:
    """End the recording, and forget it."""
    torch.cuda.memory._record_memory_history(None)


def write_recording(path: Path) -> None:
    """Write what was recorded and what the GPU's memory holds now.

    Raises:
        OSError: if the file cannot be written.
    """
    torch.cuda.memory._dump_snapshot(str(path))
