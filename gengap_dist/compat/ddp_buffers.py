"""The argument of DistributedDataParallel that turns off the copy of buffers from rank 0 in every forward pass.

Its name depends on the version of torch: the older name gives a warning where the newer one exists.

Remove when the oldest supported torch has `forward_sync_buffers` (2.14 has it).
"""

import inspect

from torch.nn.parallel import DistributedDataParallel


def no_buffer_sync() -> dict[str, bool]:
    """Arguments of DistributedDataParallel without which it would copy buffers in every forward pass."""
    has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
