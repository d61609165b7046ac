"""A store that only the ranks of this start use, where torchrun keeps one store over restarts (torch 2.15).

Unnecessary from the release on in which torchrun hands out a new store with each restart.
"""

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store


def store_of_this_start(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of torchrun's store that only the ranks of this start use.

    The kept store holds the addresses of ranks that are dead, and gloo would try those. So rank 0 publishes a new name
    and confirms each rank that has read it; a rank that has read the name of an earlier start is not confirmed, and
    asks again.

    Raises:
        TimeoutError: if rank 0 does not come.
    """
    me = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("gengap/start", me)
        for other in range(1, size):  # get waits for the key
            store.set(f"gengap/{me}/confirmed/{other}", store.get(f"gengap/{me}/{other}").decode())
        return PrefixStore(me, store)
    while time.monotonic() < until:
        start = store.get("gengap/start").decode()
        store.set(f"gengap/{start}/{rank}", me)
        confirmed = f"gengap/{start}/confirmed/{rank}"
        if store.check([confirmed]) and store.get(confirmed).decode() == me:
            return PrefixStore(start, store)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} found no rank 0 within {timeout.total_seconds():.0f} s")
