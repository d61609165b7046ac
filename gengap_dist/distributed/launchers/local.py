"""Starts ranks on this machine, or runs in this process."""

from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, final

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cores import thread_variables, threads_per_rank
from gengap_dist.distributed.launchers.base import Launcher, Progress, load_entry_point
from gengap_dist.distributed.preemption import Preempted, catching_signals
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.distributed.worker_pool import Worker, WorkerPool, environment_variables, rank_variables

SIGNAL_SECONDS = 0.2  # between two checks of the preemption flag


@final
class InProcessLauncher(Launcher):
    """One rank: this process."""

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; exceptions are passed on unchanged."""
        threads = threads_per_rank(1, config.launch.threads_per_rank)
        # this is the only rank, whatever variables a scheduler has set
        with environment_variables(rank_variables(0, 1) | thread_variables(threads.number)):
            with fast_imports():
                run = load_entry_point(self.entry_point)  # imports torch, which --help does not need
            context = RuntimeContext(threads=threads)
            with catching_signals() as flag:
                return run(config, out, resume=resume, progress=progress, preemption_requested=flag, context=context)

    def close(self, *, kill: bool = False) -> None:
        """Does nothing: there is no other process."""


@final
class LocalLauncher(Launcher):
    """`num_processes` ranks on this machine. After a failure, the next run starts new ranks."""

    def __init__(self, num_processes: int, entry_point: str, threads: int | None = None) -> None:
        """Ranks are started by the first run; `threads` is launch.threads_per_rank."""
        super().__init__(entry_point)
        self.num_processes, self.threads = num_processes, threads
        self._pool: WorkerPool | None = None

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`. A preemption signal is passed on to the ranks."""
        try:
            with catching_signals() as flag:
                threads = threads_per_rank(self.num_processes, self.threads)
                pool = self._pool = self._pool or WorkerPool(self.num_processes, threads)
                pool.start(execute_run, self.entry_point, config, out, resume)
                terminated = False
                while not pool.is_done:
                    if flag() and not terminated:
                        terminated = True
                        pool.terminate()
                    connection.wait(pool.connections, timeout=SIGNAL_SECONDS)
                    for message in pool.receive():
                        progress(*message)
        except BaseException:
            self.close(kill=True)
            raise
        return pool.results[0]

    def close(self, *, kill: bool = False) -> None:
        """See `Launcher.close`."""
        if self._pool:
            self._pool.close(kill=kill)
            self._pool = None


def execute_run(
    worker: Worker, entry_point: str, config: RunConfig, out: Path, resume: bool, in_study: bool = False
) -> dict[str, Any]:
    """The job of a worker pool that executes a run: every rank calls the entry point.

    In a study, a sentence that the run waits for a core is sent as a message: its runs would each print one.
    """
    with fast_imports():
        run = load_entry_point(entry_point)
    if worker.preemption_requested():
        raise Preempted(None)  # there is nothing to save
    return run(
        config,
        out,
        resume=resume,
        progress=worker.progress,
        preemption_requested=worker.preemption_requested,
        context=replace(worker.context, on_core_wait=worker.send) if in_study else worker.context,
    )
