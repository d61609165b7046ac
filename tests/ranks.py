"""Run a function on several real ranks."""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.worker_pool import free_port
from tests.few_figures import draw_few

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


PRELOADED = [
    "gengap_dist.training.trainer",
    "gengap_dist.analysis.report.html",
    "torch._dynamo",  # DDP imports it
    "torch.distributed.fsdp",
    "timm.optim",
]


class Forking:
    """Starts processes as forks of one that has imported torch and more, which takes each of them seconds.

    What is used of multiprocessing's contexts; a process has the environment variables of the moment it is started.
    """

    def __init__(self) -> None:
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.Pipe = self.context.Pipe

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], **more: Any) -> ForkServerProcess:
        return self.context.Process(target=_in_environment, args=(dict(os.environ), target, args), **more)


def _in_environment(variables: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    forkserver._forkserver.ensure_running = lambda: None  # pyright: ignore  # it is the parent of this process
    os.environ.clear()
    os.environ.update(variables)
    if number := variables.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(number))  # which it had read before
    target(*args)


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Context in which launchers make their ranks as `Forking` does."""
    spawn: Any = get_context("spawn")
    spawn.Process = Forking().Process
    try:
        yield
    finally:
        del spawn.Process


def start_interpreter(
    module: str, *words: object, cwd: Path, env: Mapping[str, str], timeout: float = 300.0
) -> "subprocess.CompletedProcess[str]":
    """`python -m module *words`, as a user starts it."""
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def start_module(
    module: str, *words: object, cwd: Path, env: Mapping[str, str], timeout: float = 300.0
) -> "subprocess.CompletedProcess[str]":
    """The same as a fork of a process that has imported torch, and so its ranks; with GENGAP_FULL=1 as a user does.

    The fork draws a few figures only, see `few_figures`.
    """
    if "GENGAP_FULL" in os.environ:
        return start_interpreter(module, *words, cwd=cwd, env=env, timeout=timeout)
    return _as_fork([sys.executable, "-m", module, *map(str, words)], cwd, env, timeout)


def start_script(
    script: Path, *words: object, cwd: Path, env: Mapping[str, str], timeout: float = 300.0
) -> "subprocess.CompletedProcess[str]":
    """`python script *words`, likewise."""
    command = [sys.executable, str(script), *map(str, words)]
    if "GENGAP_FULL" in os.environ:
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    return _as_fork(command, cwd, env, timeout)


def _as_fork(
    command: list[str], cwd: Path, env: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    with tempfile.TemporaryDirectory() as folder:
        process = Forking().Process(target=_main, args=(command, cwd, dict(env), Path(folder)))
        process.start()
        process.join(timeout)
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, *said)
        return subprocess.CompletedProcess(command, process.exitcode, *said)


def _main(command: list[str], cwd: Path, variables: dict[str, str], folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    os.chdir(cwd)
    _, *words = sys.orig_argv = command
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    first = cwd if is_module else Path(sys.argv[0]).parent
    sys.path[:0] = [str(first), *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    draw_few()
    run = (runpy.run_module, sys.argv[0], None, "__main__", True) if is_module else (_run_path, sys.argv[0])
    try:
        with forked_ranks():
            _in_environment(variables, run[0], run[1:])
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def _run_path(script: str) -> None:
    runpy.run_path(script, run_name="__main__")


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
