"""Starts ranks on this machine and reuses them: importing torch takes longer than a small run of a study."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.compat.hard_exit import hard_exit
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed, load_entry_point
from gengap_dist.distributed.preemption import Preempted, PreemptionFlag, catching_signals
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.errors import OutOfMemory, UsageError

PROGRESS_SECONDS = 0.1  # between two progress messages of rank 0
SIGNAL_SECONDS = 0.2  # between two checks of the preemption flag


@final
class InProcessLauncher(Launcher):
    """One rank: this process."""

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; exceptions are passed on unchanged."""
        with fast_imports():
            run = load_entry_point(self.entry_point)  # imports torch, which --help does not need

        # this is the only rank, whatever variables a scheduler has set
        with _environment_variables(rank_variables(0, 1)), catching_signals() as flag:
            return run(config, out, resume=resume, progress=progress, preemption_requested=flag)

    def close(self, *, kill: bool = False) -> None:
        """Does nothing: there is no other process."""


@final
class LocalLauncher(Launcher):
    """`num_processes` ranks on this machine. After a failure, the next run starts new ranks."""

    def __init__(self, num_processes: int, entry_point: str) -> None:
        """Ranks are started by the first run."""
        super().__init__(entry_point)
        self.num_processes = num_processes
        self._ranks: list[tuple[Any, Any]] = []  # process, pipe

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`."""
        if not self._ranks:
            self._start()
        try:
            for _, pipe in self._ranks:
                pipe.send((config, out, resume))
            with catching_signals() as flag:
                return self._wait(progress, flag)
        except BaseException:
            self.close(kill=True)
            raise

    def _start(self) -> None:
        context = get_context("spawn")
        port = free_port()
        for rank in range(self.num_processes):
            parent_pipe, rank_pipe = context.Pipe()
            env = rank_variables(rank, self.num_processes, port)
            process = context.Process(
                target=_rank_main,
                args=(rank_pipe, env, self.entry_point, sys.orig_argv),
                name=f"rank{rank}",
                daemon=True,
            )
            with _environment_variables(threads_per_rank(self.num_processes)):
                process.start()
            rank_pipe.close()
            self._ranks.append((process, parent_pipe))

    def _wait(self, progress: Progress, preemption_requested: Callable[[], bool]) -> dict[str, Any]:
        """Wait for all ranks; the result of rank 0. A preemption signal is passed on to the ranks."""
        results: dict[int, dict[str, Any]] = {}
        terminated = False
        while len(results) < len(self._ranks):
            if preemption_requested() and not terminated:
                terminated = True
                for process, _ in self._ranks:
                    process.terminate()
            pipes = [pipe for rank, (_, pipe) in enumerate(self._ranks) if rank not in results]
            connection.wait(pipes, timeout=SIGNAL_SECONDS)
            for rank, (process, pipe) in enumerate(self._ranks):
                if rank in results or not pipe.poll():
                    continue
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    process.join()
                    raise RankFailed(f"rank {rank} died with exit code {process.exitcode}") from None
                if kind == "progress":
                    progress(*value)
                elif kind == "result":
                    results[rank] = value
                elif kind == "usage":
                    raise UsageError(value)
                elif kind == "memory":
                    raise OutOfMemory(value)
                elif kind == "preempted":
                    raise Preempted(value)
                else:
                    raise RankFailed(f"rank {rank} failed:\n{value}")
        return results[0]

    def close(self, *, kill: bool = False) -> None:
        """See `Launcher.close`."""
        for process, pipe in self._ranks:
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process, pipe in self._ranks:
            process.join()
            pipe.close()
        self._ranks.clear()


def threads_per_rank(num_processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS that divides this machine's cores among ranks; a value set by the user is kept."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))}


def num_cores() -> int:
    """The cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_variables(rank: int, size: int, port: int | None = None) -> dict[str, str]:
    """The variables of `rank` of `size`, all on this machine; rank 0 listens at `port`."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return variables if port is None else variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class _environment_variables:
    """Context with environment variables set; child processes started in it inherit them."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *exc: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    """A free TCP port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(pipe: Connection, env: dict[str, str], entry_point: str, command: Sequence[str]) -> None:
    """The main function of a rank: execute runs from the pipe until it receives None; `command` is for run.json."""
    import signal
    import warnings

    os.environ.update(env)
    flag = PreemptionFlag()
    signal.signal(signal.SIGTERM, flag.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if env["RANK"] != "0":
        warnings.simplefilter("ignore")  # rank 0 shows them
    with fast_imports():
        from gengap_dist.distributed.process_group import destroy_process_group

        run = load_entry_point(entry_point)

    context, last_sent = RuntimeContext(command=command), 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last_sent
        if env["RANK"] == "0" and (note or done == total or time.monotonic() - last_sent > PROGRESS_SECONDS):
            last_sent = time.monotonic()
            pipe.send(("progress", (done, total, note)))

    try:
        while (job := pipe.recv()) is not None:
            config, out, resume = job
            try:
                result = run(config, out, resume=resume, progress=progress, preemption_requested=flag, context=context)
                pipe.send(("result", result))
            except Preempted as error:
                pipe.send(("preempted", error.step))
            except OutOfMemory as error:
                if not error.reported_elsewhere:  # the rank that reports it makes the parent end all ranks
                    pipe.send(("memory", str(error)))
            except UsageError as error:
                pipe.send(("usage", str(error)))
            except Exception:
                pipe.send(("error", traceback.format_exc()))
        destroy_process_group()
    except (EOFError, BrokenPipeError):
        hard_exit(1)  # the parent has ended
    hard_exit(0)
