"""The ranks of a study on one machine, and the loop that drives several tasks on them; no threads."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, final

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cores import Threads, available_cores
from gengap_dist.distributed.launchers.local import SIGNAL_SECONDS
from gengap_dist.distributed.preemption import Preempted, PreemptionFlag
from gengap_dist.distributed.worker_pool import Job, RankFailed, Worker, WorkerPool
from gengap_dist.errors import OutOfMemory, UsageError
from gengap_dist.study.layouts import given_threads
from gengap_dist.study.schedule import Layout, Option


@final
class Ranks:
    """The worker pools of one study, on the cores or GPUs of this machine."""

    def __init__(self, num_cores: int, gpus: Sequence[str] = ()) -> None:
        """`gpus`: entries for CUDA_VISIBLE_DEVICES; without them ranks share `num_cores` cores."""
        self.gpus, self.size = [*gpus], len(gpus) or num_cores
        self.threads_beside_gpu = max(1, num_cores // len(gpus)) if gpus else None
        """Threads of a rank that has a GPU; None: without GPUs."""
        self._idle: list[tuple[Layout, tuple[str, ...], WorkerPool]] = []
        self._busy: list[tuple[Layout, tuple[str, ...], WorkerPool]] = []

    def take(self, layout: Layout) -> WorkerPool:
        """A pool with this layout: one that has nothing to do, or a new one."""
        for entry in self._idle:
            if entry[0] == layout:
                self._idle.remove(entry)
                self._busy.append(entry)
                return entry[2]
        taken = {gpu for _, gpus, _ in self._busy for gpu in gpus}
        gpus = tuple([gpu for gpu in self.gpus if gpu not in taken][: layout.ranks]) if self.gpus else ()
        for entry in [*self._idle]:  # they would only take memory
            num_ranks = layout.ranks + sum(pool.num_ranks for _, _, pool in [*self._idle, *self._busy])
            if num_ranks > self.size or set(gpus) & set(entry[1]):
                self._idle.remove(entry)
                entry[2].close()
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        pool = WorkerPool(layout.ranks, Threads(layout.threads, "study.concurrent"), visible)
        self._busy.append((layout, gpus, pool))
        return pool

    def give_back(self, pool: WorkerPool) -> None:
        """The pool has finished its job."""
        entry = next(entry for entry in self._busy if entry[2] is pool)
        self._busy.remove(entry)
        self._idle.append(entry)

    def kill(self, pool: WorkerPool) -> None:
        """The pool has failed, or must not finish."""
        self._busy = [entry for entry in self._busy if entry[2] is not pool]
        pool.close(kill=True)

    def close(self) -> None:
        """End all ranks; those that are busy are killed."""
        for _, _, pool in self._busy:
            pool.close(kill=True)
        for _, _, pool in self._idle:
            pool.close()
        self._idle, self._busy = [], []


@contextmanager
def ranks_of_this_machine(configs: Sequence[RunConfig], environment: Mapping[str, str]) -> Iterator[Ranks]:
    """The ranks for runs that all compute on GPUs, if this machine has some, or all on its cores."""
    num_cores = available_cores().whole
    ranks = Ranks(num_cores)
    try:
        if any(config.launch.device != "cpu" for config in configs) and _has_cuda_driver():
            pool = ranks.take(Layout(1, given_threads(configs[0]) or 1))
            count = pool(count_gpus)[0]
            if count:
                ranks.close()
                visible = environment.get("CUDA_VISIBLE_DEVICES")
                ranks = Ranks(num_cores, visible.split(",")[:count] if visible else [*map(str, range(count))])
            else:
                ranks.give_back(pool)
        yield ranks
    finally:
        ranks.close()


def _has_cuda_driver() -> bool:
    """Whether there can be GPUs; without it, nobody waits for an import of torch to count them."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def count_gpus(worker: Worker) -> int:
    """The job that counts the GPUs that ranks of this machine can use."""
    import torch

    return torch.cuda.device_count()


@dataclass
class Task:
    """Something that a pool does."""

    option: Option
    job: Job
    args: tuple[Any, ...]
    on_message: Callable[[Any], None]
    on_result: Callable[[list[Any]], None]
    on_failure: Callable[[Exception], None]
    """Called with what `WorkerPool.receive` has raised; if it raises, no further task is started, and the others are
    asked to stop."""
    can_stop: bool
    """Whether SIGTERM makes it save and stop; otherwise it is killed."""
    pool: WorkerPool | None = None
    began: float = field(default_factory=time.monotonic)


def drive(
    ranks: Ranks,
    next_task: Callable[[Sequence[Task]], Task | None],
    stop_requested: PreemptionFlag,
    tick: Callable[[Sequence[Task]], None] = lambda active: None,
) -> None:
    """Execute tasks until there are none left.

    Args:
        ranks: of this machine.
        next_task: given the active tasks, what to start now; None: nothing yet, or, without active tasks, the end.
        stop_requested: set by a signal: then every task is asked to stop.
        tick: called often with the active tasks.

    Raises:
        Preempted: if a signal came, after all tasks have stopped.
        UsageError: if a task's `on_failure` or `on_result` raises one, after all other tasks have stopped.
    """
    active: list[Task] = []
    end: Exception | None = None
    asked: set[int] = set()
    while True:
        if stop_requested() and end is None:
            end = Preempted(None)
        while end is None and (task := next_task(active)) is not None:
            task.pool, task.began = ranks.take(task.option.layout), time.monotonic()
            active.append(task)
            try:
                task.pool.start(task.job, *task.args)
            except RankFailed as error:
                _fail(task, error, active, ranks)
        if end is not None:
            for task in [*active]:
                assert task.pool
                if not task.can_stop:
                    active.remove(task)
                    ranks.kill(task.pool)
                elif id(task) not in asked:
                    asked.add(id(task))
                    task.pool.terminate()
        if not active:
            break
        connection.wait([each for task in active if task.pool for each in task.pool.connections], SIGNAL_SECONDS)
        for task in [*active]:
            try:
                _receive(task, active, ranks)
            except (Preempted, UsageError) as error:
                end = error if end is None or isinstance(error, Preempted) else end
        tick(active)
    if end is not None:
        raise end


def _fail(task: Task, error: Exception, active: list[Task], ranks: Ranks) -> None:
    assert task.pool
    active.remove(task)
    ranks.kill(task.pool)
    task.on_failure(error)


def _receive(task: Task, active: list[Task], ranks: Ranks) -> None:
    """Take what the ranks of a task have sent; at its end, free them.

    Raises:
        UsageError: if what is done with a result, or with a failure, raises it.
        Preempted: if the task was asked to stop, and has.
    """
    assert task.pool
    try:
        messages = task.pool.receive()
    except (UsageError, Preempted, RankFailed, OutOfMemory) as error:
        _fail(task, error, active, ranks)
        return
    for message in messages:
        task.on_message(message)
    if task.pool.is_done:
        active.remove(task)
        results = task.pool.results
        ranks.give_back(task.pool)
        task.on_result([results[rank] for rank in range(task.pool.num_ranks)])
