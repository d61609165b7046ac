"""Ranks on this machine that stay, and execute one job after another: importing torch takes longer than a small job.

Several pools can work side by side: `start` does not wait, `connections` says when there is something to `receive`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, final

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.compat.hard_exit import hard_exit
from gengap_dist.compat.safe_path import safe_path_variables
from gengap_dist.compat.standard_streams import keep_streams
from gengap_dist.compat.warnings_as_text import format_warnings
from gengap_dist.credentials import command_line, printable
from gengap_dist.distributed import cgroups
from gengap_dist.distributed.cores import Threads, thread_variables
from gengap_dist.distributed.orphans import end_with
from gengap_dist.distributed.preemption import SIGNALS, TIME_SIGNALS, Preempted, PreemptionFlag, handle
from gengap_dist.distributed.runtime_context import LOOPBACK, RuntimeContext
from gengap_dist.errors import OutOfMemory, UsageError

PROGRESS_SECONDS = 0.1  # between two progress messages of rank 0
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class RankFailed(RuntimeError):
    """A rank raised an unexpected exception or died; the message contains its traceback or exit code."""


@final
@dataclass
class Worker:
    """One rank of a pool, as a job sees it."""

    rank: int
    threads: int
    """How many it may start."""
    pipe: Any = field(repr=False)
    context: RuntimeContext
    preemption_requested: PreemptionFlag = field(default_factory=PreemptionFlag)
    """Set by SIGTERM and others."""
    _last_sent: float = 0.0

    def progress(self, done: int, total: int, note: str) -> None:
        """Tell the parent that `done` of `total` steps are complete; only rank 0 does, and not every time."""
        now = time.monotonic()
        if self.rank == 0 and (note or done == total or now - self._last_sent > PROGRESS_SECONDS):
            self._last_sent = now
            self.send((done, total, note))

    def send(self, message: Any) -> None:
        """Send something to the parent before the job has ended."""
        self.pipe.send(("message", message))


Job = Callable[..., Any]
"""A function of a module, called as job(worker, *args) on every rank. It may raise UsageError, OutOfMemory and
Preempted; another exception is passed on with its traceback."""


@final
class WorkerPool:
    """`num_ranks` processes that form a process group as soon as a job asks for it.

    After a failure the pool can only be closed.
    """

    def __init__(
        self,
        num_ranks: int,
        threads: Threads,
        environment: Mapping[str, str] | None = None,
        *,
        daemon: bool = True,
    ) -> None:
        """Start the ranks.

        Args:
            num_ranks: number of processes.
            threads: of each of them.
            environment: more variables of the ranks, such as CUDA_VISIBLE_DEVICES.
            daemon: whether they end with this process in any case; then they may have no children of their own.
        """
        self.num_ranks, self.threads = num_ranks, threads
        self.results: dict[int, Any] = {}
        """What the current job has returned so far, by rank."""
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._num_oom_kills = cgroups.num_oom_kills()
        try:
            with _signals_wait():
                self._start_ranks(environment or {}, daemon=daemon)
        except BaseException:
            self.close(kill=True)  # those that have been started would wait for a job for ever
            raise

    def _start_ranks(self, environment: Mapping[str, str], *, daemon: bool) -> None:
        context, port, num_ranks, threads = get_context("spawn"), free_port(), self.num_ranks, self.threads
        for rank in range(num_ranks):
            here, there = context.Pipe()
            at_start, safe = thread_variables(threads.number) | dict(environment), safe_path_variables()
            variables = rank_variables(rank, num_ranks, port) | at_start | {name: os.environ.get(name) for name in safe}
            process = context.Process(
                target=_rank_main,
                args=(rank, there, variables, threads, command_line()),
                name=f"rank{rank}",
                daemon=daemon,
            )
            # for modules that are imported before _rank_main is called
            with environment_variables(at_start | safe):
                process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def start(self, job: Job, *args: Any) -> None:
        """Start a job on all ranks, which have finished the one before."""
        self.results = {}
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((job, args))
            except (BrokenPipeError, ConnectionResetError):
                raise self._death(rank) from None

    @property
    def is_done(self) -> bool:
        """Whether all ranks have finished the current job."""
        return len(self.results) == self.num_ranks

    @property
    def connections(self) -> list[Any]:
        """For multiprocessing.connection.wait: one is ready as soon as `receive` has something to do."""
        return [pipe for rank, pipe in enumerate(self._pipes) if rank not in self.results]

    def receive(self) -> list[Any]:
        """Take what ranks have sent, without waiting; returns the messages of the job, mostly (done, total, note).

        Raises:
            UsageError: if a rank rejects the job.
            OutOfMemory: if its memory was too small.
            Preempted: if a rank was told to stop, and has.
            RankFailed: if a rank failed for another reason.
        """
        messages: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            while rank not in self.results and pipe.poll():
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(rank) from None
                if kind == "message":
                    messages.append(value)
                elif kind == "result":
                    self.results[rank] = value
                elif kind == "usage":
                    raise UsageError(value)
                elif kind == "memory":
                    raise OutOfMemory(value)
                elif kind == "preempted":
                    raise Preempted(value)
                else:
                    raise RankFailed(f"rank {rank} failed:\n{value}")
        return messages

    def __call__(self, job: Job, *args: Any) -> list[Any]:
        """Run a job to its end; what it returns on each rank. Raises what `receive` does, and kills the ranks then."""
        try:
            self.start(job, *args)
            while not self.is_done:
                connection.wait(self.connections)
                self.receive()
        except BaseException:
            self.close(kill=True)
            raise
        return [self.results[rank] for rank in range(self.num_ranks)]

    def _death(self, rank: int) -> RankFailed:
        self._processes[rank].join()
        code: int = self._processes[rank].exitcode
        text = f"rank {rank} died with exit code {code}" + (f" ({signal.Signals(-code).name})" if code < 0 else "")
        if code == -signal.SIGKILL and cgroups.num_oom_kills() > self._num_oom_kills:
            text += (
                "; the kernel has meanwhile killed a process for lack of memory, so that may be the reason: choose a "
                "smaller batch.micro_size or fewer ranks on this machine, or ask for more memory"
            )
        return RankFailed(text)

    def terminate(self) -> None:
        """Ask the ranks to stop at the next step, by SIGTERM; their job then raises Preempted."""
        for process in self._processes:
            process.terminate()

    def close(self, *, kill: bool = False) -> None:
        """End the ranks: in an orderly way after their job, or at once if `kill` is set."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kill:
                process.kill()
            else:
                try:
                    pipe.send(None)
                except (BrokenPipeError, ConnectionResetError):  # it has died between two jobs
                    process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes.clear()
        self._pipes.clear()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Context in which SIGNALS wait, also in the processes that are started: `_rank_main` lets them come."""
    with environment_variables(safe_path_variables()):
        resource_tracker.ensure_running()  # which would let them come, too
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def rank_variables(rank: int, size: int, port: int | None = None) -> dict[str, str]:
    """The variables of `rank` of `size`, all on this machine; rank 0 listens at `port`.

    Nobody else can connect to the ranks, unless the user has named another network interface.
    """
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        variables[name] = os.environ.get(name) or LOOPBACK_INTERFACE
    return variables if port is None else variables | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}


class environment_variables:
    """Context with environment variables set; child processes started in it inherit them."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """`variables`: names and values."""
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
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _rank_main(
    rank: int, pipe: Connection, variables: Mapping[str, str | None], threads: Threads, command: Sequence[str]
) -> None:
    """The main function of a rank: execute jobs until it receives None; `command` is for run.json.

    A variable that is None is removed: this process alone was started with it.
    """
    import warnings

    os.environ.update({name: value for name, value in variables.items() if value is not None})
    for name in [name for name, value in variables.items() if value is None]:
        os.environ.pop(name, None)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # these ranks belong to no launch of torchrun
    worker = Worker(rank, threads.number, pipe, RuntimeContext(command=command, threads=threads))
    handle(TIME_SIGNALS, worker.preemption_requested.set)
    signal.signal(signal.SIGTERM, worker.preemption_requested.set)  # of the parent, also where a script ignores it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent
    end_with(parent.is_alive)
    keep_streams()
    if rank != 0:
        warnings.simplefilter("ignore")  # rank 0 shows them
    format_warnings(printable)
    try:
        while (received := pipe.recv()) is not None:
            job, args = received
            try:
                pipe.send(("result", job(worker, *args)))
            except Preempted as error:
                pipe.send(("preempted", error.step))
            except OutOfMemory as error:
                if not error.reported_elsewhere:  # the rank that reports it makes the parent end all ranks
                    pipe.send(("memory", str(error)))
            except UsageError as error:
                pipe.send(("usage", str(error)))
            except Exception:
                pipe.send(("error", traceback.format_exc()))
        if "torch" in sys.modules:
            with fast_imports():
                from gengap_dist.distributed.process_group import destroy_process_group

            destroy_process_group()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        hard_exit(1)  # the parent has ended
    hard_exit(0)
