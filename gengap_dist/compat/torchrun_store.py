"""A separate store for the ranks of each restart: torchrun keeps one store over all restarts (torch 2.15).

Remove when torchrun creates a new store for each restart.
"""

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store


def restart_store(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of torchrun's store that only the ranks of the current restart use.

    The kept store contains the addresses of processes that have ended, and gloo would connect to them. So rank 0
    publishes a new prefix and confirms each rank that has read it; a rank that has read the prefix of an earlier start
    is not confirmed, and reads again.

    Raises:
        TimeoutError: if rank 0 does not confirm within `timeout`.
    """
    token = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("gengap/start", token)
        for other in range(1, size):  # get blocks until the key exists
            store.set(f"gengap/{token}/confirmed/{other}", store.get(f"gengap/{token}/{other}").decode())
        return PrefixStore(token, store)
    while time.monotonic() < deadline:
        start = store.get("gengap/start").decode()
        store.set(f"gengap/{start}/{rank}", token)
        confirmed = f"gengap/{start}/confirmed/{rank}"
        if store.check([confirmed]) and store.get(confirmed).decode() == token:
            return PrefixStore(start, store)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} was not confirmed by rank 0 within {timeout.total_seconds():.0f} s")
