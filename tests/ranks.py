"""Run a function on several real ranks."""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from typing import Any

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.worker_pool import free_port

ON_CPU = LaunchConfig(device="cpu")


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
        rank, result, error = results.get(timeout=300)
        if error:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {error}")
        got[rank] = result
    for process in processes:
        process.join()
    return [got[rank] for rank in range(size)]


class Forking:
    """Starts processes as forks of one that has imported torch and the trainer, which takes each of them seconds.

    What is used of multiprocessing's contexts; a process has the environment variables of the moment it is started.
    """

    def __init__(self) -> None:
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "gengap_dist.training.trainer"])
        self.Pipe = self.context.Pipe

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], **more: Any) -> ForkServerProcess:
        return self.context.Process(target=_in_environment, args=(dict(os.environ), target, args), **more)


def _in_environment(variables: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    target(*args)


class Crew:
    """Ranks that stay, for many small jobs: `crew(job, *args)` is like `on_ranks(size, job, *args)`."""

    def __init__(self, size: int, launch: LaunchConfig = ON_CPU) -> None:
        context = Forking() if launch.device == "cpu" else get_context("spawn")
        port = free_port()
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [here for here, _ in pairs]
        self.processes = [
            context.Process(target=_stay, args=(rank, size, port, there, launch), daemon=True)
            for rank, (_, there) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((job, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(300), f"rank {rank} does not answer"
            result, error = pipe.recv()
            assert not error, f"rank {rank}: {error}"
            answers.append(result)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()


class Crews:
    """Ranks that stay, of every size that is asked for: `crews[size](job, *args)`; after an error they start anew."""

    def __init__(self) -> None:
        self.started: dict[int, Crew] = {}

    def __getitem__(self, size: int) -> Callable[..., list[Any]]:
        return partial(self._run, size)

    def _run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        if size not in self.started:
            self.started[size] = Crew(size)
        try:
            return self.started[size](job, *args)
        except BaseException:
            self.started.pop(size).close()
            raise

    def close(self) -> None:
        while self.started:
            self.started.popitem()[1].close()


@contextmanager
def standing(kind: Callable[[int], Any], sizes: Iterable[int]) -> Iterator[dict[int, Any]]:
    """Ranks that stay while it is open, `kind(size)` of each size; Crew and Pool are such kinds."""
    with ExitStack() as stack:
        yield {size: stack.enter_context(closing(kind(size))) for size in sizes}


def _stay(rank: int, size: int, port: int, pipe: Any, launch: LaunchConfig) -> None:
    _environment(rank, size, port)
    from gengap_dist.distributed.phase_timer import PhaseTimer
    from gengap_dist.distributed.process_group import init_process_group

    world = init_process_group(launch.device, launch.timeout_seconds)
    while True:
        job, args = pipe.recv()
        # the phase in which the last job ended is not this one's
        timer = PhaseTimer(on_gpu=world.device.type == "cuda")
        try:
            pipe.send((job(replace(world, timer=timer), *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def _rank(rank: int, size: int, port: int, results: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _environment(rank, size, port)
    from gengap_dist.distributed.process_group import destroy_process_group, init_process_group

    try:
        results.put((rank, job(init_process_group(ON_CPU.device, ON_CPU.timeout_seconds), *args), None))
        destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def _environment(rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)  # the variable comes too late where a job's module has imported torch
