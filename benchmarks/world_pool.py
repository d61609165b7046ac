"""Ranks that stay in one process group, so that several pools can take turns."""

import ctypes
from collections.abc import Callable
from typing import Any

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.cores import Threads, threads_per_rank
from gengap_dist.distributed.process_group import World, init_process_group
from gengap_dist.distributed.worker_pool import Worker, WorkerPool

_worlds: list[World] = []  # of a rank, after its first job


class WorldPool:
    """Processes on this machine that form their own process group; they sleep between two calls."""

    def __init__(self, size: int, device: str, threads: int | None = None) -> None:
        """Start `size` ranks with so many threads each; None: as many as there are cores for."""
        self.device = device
        number = Threads(threads, "benchmark") if threads else threads_per_rank(size)
        self.pool = WorkerPool(size, number, daemon=False)  # loaders of peers have processes of their own

    def __call__(self, job: Callable[..., Any], *args: Any) -> Any:
        """Run `job(world, *args)` on all ranks; returns the result of rank 0. Raises RankFailed."""
        return self.pool(run_in_world, self.device, job, args)[0]

    def close(self, *, kill: bool = False) -> None:
        """End the ranks."""
        self.pool.close(kill=kill)


def run_in_world(worker: Worker, device: str, job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The job of a rank: the given one, with the ranks of the first call."""
    if not _worlds:
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(-8, 1)  # M_ARENA_MAX: threads use the same memory as in separate programs
        _worlds.append(init_process_group(device, LaunchConfig().timeout_seconds))
    return job(_worlds[0], *args)
