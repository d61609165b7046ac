"""Ranks that stay up and sleep until they are called, so that several groups of them can take turns."""

import ctypes
import os
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any, cast

import torch

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.base import hard_exit
from gengap_dist.distributed.launchers.local import free_port, rank_variables
from gengap_dist.distributed.process_group import init_process_group


class WorkerPool:
    """A process group of its own on this machine."""

    def __init__(self, size: int, device: str, environment: dict[str, str] | None = None) -> None:
        """Start `size` ranks, with more variables in their environment."""
        context, port = get_context("spawn"), free_port()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(size):
            here, there = context.Pipe()
            env = rank_variables(rank, size, port) | (environment or {})
            self.processes.append(context.Process(target=_stay, args=(there, env, device)))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def __call__(self, job: Callable[..., Any], *args: Any) -> Any:
        """What `job(world, *args)` returns on rank 0, when all have done it."""
        for pipe in self.pipes:
            pipe.send((job, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            awaited: list[Any] = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for pipe in cast("list[Any]", connection.wait(awaited)):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank], error = pipe.recv()
                except EOFError:
                    error = "its process died"
                if error:
                    for process in self.processes:
                        process.kill()
                    raise SystemExit(f"rank {rank} of {len(self.pipes)} failed:\n{error}")
        return answers[0]

    def leave(self) -> None:
        """End the ranks."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()


def _stay(pipe: Any, env: dict[str, str], device: str) -> None:
    """A rank's life."""
    os.environ |= env
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-8, 1)  # M_ARENA_MAX: threads have the memory that they would have as programs of their own
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # the variable comes too late: torch is imported
    world = init_process_group(device, LaunchConfig().timeout_seconds)
    while True:
        try:
            job, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            hard_exit(0)
        try:
            pipe.send((job(world, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
