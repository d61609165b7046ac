"""Run a function on several real ranks."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from gengap_dist.config import LaunchConfig
from gengap_dist.launchers.local import free_port


def on_ranks(size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What `job(world, *args)` returns on each of `size` gloo ranks; `job` is a function of a module."""
    context = get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, results, job, args), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    got: dict[int, Any] = {}
    while len(got) < size:
        rank, result, error = results.get(timeout=120)
        if error:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {error}")
        got[rank] = result
    for process in processes:
        process.join()
    return [got[rank] for rank in range(size)]


def _rank(rank: int, size: int, port: int, results: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    from gengap_dist.world import connect, disconnect

    try:
        results.put((rank, job(connect(LaunchConfig(device="cpu")), *args), None))
        disconnect()
    except Exception:
        results.put((rank, None, traceback.format_exc()))
