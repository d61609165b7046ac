"""The store of the default process group, which torch exports under a private name only.

Our own stores would not do: under Ray, Ray Train creates the process group and its store.

Remove when torch.distributed has a public name for the store of a process group.
"""

import torch.distributed as dist


def default_store() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The key-value store of the default process group; it works also where collectives do not."""
    return dist.distributed_c10d._get_default_store()
