"""A pool of persistent ranks that sleep between calls, so that several pools can take turns."""

import ctypes
import os
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any, cast

import torch

from gengap_dist.compat.hard_exit import hard_exit
from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.local import free_port, rank_variables
from gengap_dist.distributed.process_group import init_process_group


class WorkerPool:
    """Processes on this machine that form their own process group."""

    def __init__(self, size: int, device: str, environment: dict[str, str] | None = None) -> None:
        """Start `size` ranks with additional environment variables."""
        context, port = get_context("spawn"), free_port()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(size):
            parent_pipe, child_pipe = context.Pipe()
            env = rank_variables(rank, size, port) | (environment or {})
            self.processes.append(context.Process(target=_worker_main, args=(child_pipe, env, device)))
            self.processes[-1].start()
            child_pipe.close()
            self.pipes.append(parent_pipe)

    def __call__(self, job: Callable[..., Any], *args: Any) -> Any:
        """Run `job(world, *args)` on all ranks; returns the result of rank 0."""
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

    def close(self) -> None:
        """End the ranks."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()


def _worker_main(pipe: Any, env: dict[str, str], device: str) -> None:
    """Main loop of a rank: run jobs until the pipe is closed."""
    os.environ |= env
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-8, 1)  # M_ARENA_MAX: threads use the same memory as in separate programs
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # torch is already imported, so the variable has no effect
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
