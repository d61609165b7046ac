"""Runs of a study side by side on one machine, as `schedule` says, on ranks that stay.

With study.concurrent=auto the layouts and the order follow from a few measured steps of each distinct run; the costs
are kept in the user's cache folder. All runs are driven from one loop: it starts what fits, waits for messages, and
passes signals on.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from typing import Any, final

import psutil

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cgroups import memory_limits
from gengap_dist.distributed.cores import Threads, available_cores
from gengap_dist.distributed.launchers.local import SIGNAL_SECONDS, execute_run
from gengap_dist.distributed.preemption import Preempted, PreemptionFlag, catching_signals
from gengap_dist.distributed.worker_pool import Job, RankFailed, Worker, WorkerPool
from gengap_dist.errors import OutOfMemory, UsageError
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study.layouts import given_threads, keeps_ranks, possible_layouts, with_ranks
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback
from gengap_dist.study.schedule import Layout, Option, Placed, Resources, best_schedule, length, placed
from gengap_dist.training import ENTRY_POINT
from gengap_dist.training.run_cost import CostCache, RunCost, cost_key, measure_cost

GIB = 2**30
MIN_SHARE = 0.1  # of a run that says how long others may take
START_SECONDS = 4.0  # of ranks: they import torch
WORTH_SECONDS = 15.0  # what further layouts must be able to save to be measured
LOOK_SECONDS = 1.0  # while cores are free and the next run waits for more of them
FORECAST_SECONDS = 1.0  # between two forecasts of the time left

Costs = dict[str, dict[Layout, RunCost]]
"""By key of a run (see `cost_key`, without the layout), then by layout."""


# -- ranks ------------------------------------------------------------------------------------------------------------


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
    num_cores = max(1, int(available_cores().number))
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


# -- the loop ---------------------------------------------------------------------------------------------------------


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
            end = Preempted(0)
        while end is None and (task := next_task(active)) is not None:
            task.pool, task.began = ranks.take(task.option.layout), time.monotonic()
            active.append(task)
            try:
                task.pool.start(task.job, *task.args)
            except RankFailed as error:
                active.remove(task)
                ranks.kill(task.pool)
                task.on_failure(error)
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
        active.remove(task)
        ranks.kill(task.pool)
        task.on_failure(error)
        return
    for message in messages:
        task.on_message(message)
    if task.pool.is_done:
        active.remove(task)
        results = task.pool.results
        ranks.give_back(task.pool)
        task.on_result([results[rank] for rank in range(task.pool.num_ranks)])


# -- costs ------------------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes that ranks of this machine can still allocate together."""
    return min([psutil.virtual_memory().available, *(free for _, free in memory_limits())])


@final
class CostTable:
    """What the runs of a study cost in each layout, as far as that is known."""

    def __init__(self, ranks: Ranks, cache: CostCache) -> None:
        """Costs for these ranks; those in the cache are known."""
        self.ranks, self.cache = ranks, cache
        self._costs: Costs = {}
        self._unknown: set[tuple[str, Layout]] = set()  # could not be measured

    def key(self, config: RunConfig) -> str:
        """The name of a run without its seed."""
        return cost_key(config, "gpu" if self.ranks.gpus else "cpu", 0, config.launch.num_processes)

    def find(self, config: RunConfig, layout: Layout) -> RunCost | None:
        """The cost of a run in a layout, if it is known."""
        of_run = self._costs.setdefault(self.key(config), {})
        if layout not in of_run:
            key = cost_key(with_ranks(config, layout.ranks), "gpu" if self.ranks.gpus else "cpu", *layout)
            if key in self.cache.found:
                of_run[layout] = self.cache.found[key]
        return of_run.get(layout)

    def is_fixed(self, config: RunConfig) -> bool:
        """Whether a run keeps launch.num_processes ranks: by its settings, or by what was measured of its network."""
        known = self._costs.get(self.key(config), {})
        return keeps_ranks(config) or any(cost.depends_on_ranks for cost in known.values())

    def layouts(self, config: RunConfig) -> list[Layout]:
        """The layouts in which a run may be executed on these ranks, smallest first."""
        return possible_layouts(
            config, self.ranks.size, fixed=self.is_fixed(config), threads_beside_gpu=self.ranks.threads_beside_gpu
        )

    def num_cores(self, layout: Layout) -> int:
        """Cores or GPUs that a layout occupies, at most all."""
        return min(self.ranks.size, layout.ranks if self.ranks.gpus else layout.cores)

    def options(self, config: RunConfig) -> list[Option]:
        """The layouts whose cost is known; the smallest, if none is."""
        layouts = self.layouts(config)
        known = [(layout, self.find(config, layout)) for layout in layouts]
        found = [
            Option(
                layout,
                self.num_cores(layout),
                cost.seconds + START_SECONDS * (layout != layouts[0]),
                0 if self.ranks.gpus else layout.ranks * cost.memory_bytes,  # a GPU has one run at a time
            )
            for layout, cost in known
            if cost
        ]
        return found or [Option(layouts[0], self.num_cores(layouts[0]), 0.0)]

    def measure(
        self,
        wanted: Sequence[tuple[RunConfig, Layout]],
        stop_requested: PreemptionFlag,
        progress: Callable[[int, int], None],
    ) -> None:
        """Measure what is not known yet, side by side.

        Raises:
            UsageError: if a run is refused, or its ranks are killed.
            Preempted: if a signal came.
        """
        waiting: dict[str, tuple[RunConfig, Layout]] = {}
        for config, layout in wanted:
            key = cost_key(with_ranks(config, layout.ranks), "gpu" if self.ranks.gpus else "cpu", *layout)
            if self.find(config, layout) is None and (key, layout) not in self._unknown:
                waiting.setdefault(key, (config, layout))
        named, total, new = dict(waiting), len(waiting), dict[str, RunCost]()

        def next_task(active: Sequence[Task]) -> Task | None:
            free = self.ranks.size - sum(task.option.cores for task in active)
            for key, (config, layout) in waiting.items():
                cores = self.num_cores(layout)
                if cores <= free:
                    del waiting[key]
                    return Task(
                        Option(layout, cores, 0.0),
                        measure_cost,
                        (with_ranks(config, layout.ranks),),
                        on_message=lambda message: None,
                        on_result=partial(keep, key),
                        on_failure=partial(fail, key, layout),
                        can_stop=False,
                    )
            return None

        def keep(key: str, costs: list[RunCost]) -> None:
            slowest = max(costs, key=lambda cost: cost.seconds)
            new[key] = slowest.model_copy(update={"memory_bytes": max(cost.memory_bytes for cost in costs)})
            progress(len(new), total)

        def fail(key: str, layout: Layout, error: Exception) -> None:
            if isinstance(error, UsageError) and not isinstance(error, OutOfMemory):
                raise error
            if "exit code -9" in str(error):
                raise UsageError(
                    f"a run was killed while its cost was measured ({str(error).strip()}), probably because memory is "
                    f"too small ({free_memory() / GIB:.1f} GiB are free): choose a smaller batch.micro_size or model"
                )
            self._unknown.add((key, layout))  # the run itself reports it

        if waiting:
            progress(0, total)
            drive(self.ranks, next_task, stop_requested)
            for key, (config, layout) in named.items():
                if key in new:
                    self._costs[self.key(config)][layout] = new[key]
            self.cache.add(new)


def measure_what_matters(
    table: CostTable,
    configs: Sequence[RunConfig],
    stop_requested: PreemptionFlag,
    progress: Callable[[int, int], None],
) -> None:
    """Measure each distinct run in its smallest layout, then in larger ones if the study could end much sooner."""
    for _ in range(2):  # what depends on ranks is known after the first time
        table.measure([(config, table.layouts(config)[0]) for config in configs], stop_requested, progress)
    resources = Resources(table.ranks.size)
    if not all(table.find(config, table.layouts(config)[0]) for config in configs):
        return
    for _ in range(2):
        now = length(best_schedule([table.options(config) for config in configs], resources))
        hoped = best_schedule([_with_hoped(table, config) for config in configs], resources)
        if now - length(hoped) < max(WORTH_SECONDS, 0.1 * now):
            return
        chosen = [(configs[run.number], run.option.layout) for run in hoped]
        larger = [
            (config, layout)
            for config, of_chosen in chosen
            for layout in table.layouts(config)
            if table.num_cores(layout) == table.num_cores(of_chosen)
        ]
        table.measure(larger, stop_requested, progress)


def _with_hoped(table: CostTable, config: RunConfig) -> list[Option]:
    """The options of a run, and those that are not known yet as if they scaled perfectly."""
    known = table.options(config)
    layouts = {option.layout for option in known}
    first = known[0]
    return known + [
        Option(layout, cores, first.seconds * first.cores / cores + START_SECONDS, first.memory * layout.ranks)
        for layout in table.layouts(config)
        if layout not in layouts and (cores := table.num_cores(layout)) > first.cores
    ]


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Active:
    """A run that is executed now."""

    planned: PlannedRun
    task: Task
    first: int = -1
    """Number of steps that were done when it continued."""
    done: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """Share of the steps that are done, since it started or continued."""
        return (self.done - self.first) / max(1, self.total - self.first) if self.total else 0.0

    @property
    def seconds(self) -> float:
        """Of the whole run, by the steps that are done."""
        return (time.monotonic() - self.task.began) / self.share

    def left(self, expected: float) -> float:
        """Seconds until its end: at first as expected, later by the steps that are done."""
        elapsed, share = time.monotonic() - self.task.began, self.share
        by_cost = max(0.0, expected * (1 - self.first / self.total if self.total else 1.0) - elapsed)
        return share * elapsed * (1 - share) / share + (1 - share) * by_cost if share > 0 else by_cost


@final
class Packer:
    """Executes the runs of a study side by side."""

    def __init__(
        self,
        plan: Sequence[PlannedRun],
        callback: StudyCallback,
        options: Sequence[Sequence[Option]],
        resources: Resources,
    ) -> None:
        """Runs, and the options of each; no run has started."""
        self.plan, self.callback, self.options, self.resources = plan, callback, options, resources
        self.waiting = [*range(len(plan))]
        self.active: dict[int, Active] = {}  # by number
        self.num_failed = 0
        self._known: dict[str, list[tuple[float, float]]] = {}  # by arm: (expected, actual) seconds of ended runs
        self._forecast_at = 0.0
        self._due: list[tuple[int, Option]] = []  # runs to start now
        self._look_at = 0.0  # when to look again whether a run can start

    def run(self, ranks: Ranks, stop_requested: PreemptionFlag) -> int:
        """Execute all; returns the number of runs that failed.

        Raises:
            Preempted: if a signal came; all runs have saved.
            UsageError: if a rank rejects a run.
        """
        try:
            drive(ranks, self._next, stop_requested, self._tick)
        except BaseException as error:
            for run in self.active.values():
                run_folder.close_abandoned(run.planned.folder, error)
            raise
        return self.num_failed

    def _next(self, active: Sequence[Task]) -> Task | None:
        """The task that the best schedule starts now."""
        if self._due:
            return self._start(*self._due.pop(0))
        if not self.waiting or len(self.active) >= self.resources.slots or time.monotonic() < self._look_at:
            return None
        running = self._running()
        if not running or sum(option.cores for _, option in running) < self.resources.cores:
            schedule = best_schedule([self._scaled(number) for number in self.waiting], self.resources, running)
            self._due = [(self.waiting[run.number], run.option) for run in schedule if run.start == 0.0]
        if not self._due:
            self._look_at = time.monotonic() + LOOK_SECONDS
            return None
        return self._start(*self._due.pop(0))

    def _running(self) -> list[tuple[float, Option]]:
        """(seconds until its end, option) of each active run."""
        return [
            (run.left(self._expected(run.planned.arm, run.task.option)), run.task.option)
            for run in self.active.values()
        ]

    def _scaled(self, number: int) -> list[Option]:
        arm = self.plan[number].arm
        return [option._replace(seconds=self._expected(arm, option)) for option in self.options[number]]

    def _expected(self, arm: str, option: Option) -> float:
        """Seconds of a run of an arm: as measured, times how much longer runs take that have ended, or have come far.

        Runs of the same arm say it best; without one, all do.
        """
        known = {arm: [*pairs] for arm, pairs in self._known.items()}
        for run in self.active.values():
            if run.share > MIN_SHARE:
                known.setdefault(run.planned.arm, []).append((run.task.option.seconds, run.seconds))
        pairs = known.get(arm) or [pair for of_arm in known.values() for pair in of_arm]
        if not pairs:
            return option.seconds
        expected, actual = (sum(values) for values in zip(*pairs, strict=True))
        return option.seconds * actual / expected if option.seconds and expected else actual / len(pairs)

    def _start(self, number: int, option: Option) -> Task:
        planned = self.plan[number]
        self.waiting.remove(number)
        run_folder.prepare_folder(planned.folder, "run.json", resume=True)
        config = with_ranks(planned.config, option.layout.ranks)
        task = Task(
            option,
            execute_run,
            (ENTRY_POINT, config, planned.folder, True),
            on_message=partial(self._on_step, number),
            on_result=partial(self._on_result, number),
            on_failure=partial(self._on_failure, number),
            can_stop=True,
        )
        self.active[number] = Active(planned, task)
        return task

    def _on_step(self, number: int, message: tuple[int, int, str]) -> None:
        run, (done, total, note) = self.active[number], message
        if total:
            run.first = done if run.first < 0 else run.first
            run.done, run.total = done, total
        self.callback.on_step(run.planned, done, total, note)

    def _on_result(self, number: int, results: list[Any]) -> None:
        run = self._ended(number)
        status = run_folder.read_info(run.planned.folder).status
        if status == RunStatus.FINISHED and run.first <= 1:
            actual = time.monotonic() - run.task.began
            self._known.setdefault(run.planned.arm, []).append((run.task.option.seconds, actual))
        self.callback.on_run_end(run.planned, status)

    def _ended(self, number: int) -> Active:
        self._look_at = 0.0
        return self.active.pop(number)

    def _on_failure(self, number: int, error: Exception) -> None:
        run = self._ended(number)
        run_folder.close_abandoned(run.planned.folder, error)
        if isinstance(error, OutOfMemory) or not isinstance(error, UsageError | Preempted):
            self.num_failed += 1
            self.callback.on_run_end(run.planned, f"failed: {str(error).strip().splitlines()[-1]}")
            return
        raise error

    def _tick(self, active: Sequence[Task]) -> None:
        if time.monotonic() - self._forecast_at > FORECAST_SECONDS:
            self._forecast_at = time.monotonic()
            if (left := self.seconds_left()) is not None:
                self.callback.on_time_left(left)

    def seconds_left(self) -> float | None:
        """Forecast of the seconds until all runs have ended; None if nothing is known yet."""
        options = [min(self._scaled(number), key=lambda option: option.cores) for number in self.waiting]
        if not all(option.seconds for option in options):
            return None
        running = self._running()
        return length(placed(options, self.resources, running), running)


def run_packed(
    plan: Sequence[PlannedRun], callback: StudyCallback, concurrent: int | None, warn: Callable[[str], None]
) -> int:
    """Execute runs on this machine; returns the number of runs that failed.

    Args:
        plan: the runs, none of which is finished.
        callback: called on every step and at the end of every run.
        concurrent: number of runs at once, each on launch.num_processes ranks; None: see the module.
        warn: called with one sentence.
    """
    import os

    configs = [planned.config for planned in plan]
    with catching_signals() as flag, ranks_of_this_machine(configs, os.environ) as ranks:
        _download(configs, ranks)
        if concurrent:
            _check_gpus(configs, concurrent, ranks)
            resources = Resources(10**9, slots=concurrent)
            options = [[_given_option(config, concurrent, ranks)] for config in configs]
        else:
            table = CostTable(ranks, CostCache(warn))
            measure_what_matters(table, configs, flag, callback.on_measure)
            options = [table.options(config) for config in configs]
            resources = Resources(ranks.size, free_memory())
            check_memory(plan, options, resources)
        return Packer(plan, callback, options, resources).run(ranks, flag)


def _download(configs: Sequence[RunConfig], ranks: Ranks) -> None:
    """Download each data set once, before several runs want it."""
    wanted = {config.data.model_dump_json(): config for config in configs if config.data.download}
    for config in wanted.values():
        pool = ranks.take(Layout(1, 1))
        pool(load_data, config)
        ranks.give_back(pool)


def load_data(worker: Worker, config: RunConfig) -> None:
    """The job that reads a data set, and downloads it if it is not there."""
    from gengap_dist.data import datasets

    datasets.load(config.data, lambda label, done, total: None)


def _check_gpus(configs: Sequence[RunConfig], concurrent: int, ranks: Ranks) -> None:
    needed = concurrent * max(config.launch.num_processes for config in configs)
    if ranks.gpus and concurrent > 1 and needed > ranks.size:
        raise UsageError(
            f"study.concurrent ({concurrent}) asks for {needed} ranks with a GPU each, and this machine has "
            f"{ranks.size}: choose a smaller number, auto, or launch.device=cpu"
        )


def predict(
    plan: Sequence[PlannedRun],
    concurrent: int | None,
    num_gpus: int,
    *,
    measure: bool,
    warn: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Placed], int] | None:
    """The schedule of a study on this machine, and the number of its cores or GPUs; None if a cost is not known.

    Args:
        plan: the runs.
        concurrent: as for `run_packed`.
        num_gpus: that ranks can use.
        measure: whether to measure costs that are not known.
        warn: called with one sentence.
        progress: called while costs are measured.
    """
    configs = [planned.config for planned in plan]
    ranks = Ranks(max(1, int(available_cores().number)), [*map(str, range(num_gpus))])
    with catching_signals() as flag, closing(ranks):
        table = CostTable(ranks, CostCache(warn))
        if measure:
            measure_what_matters(table, configs, flag, progress)
        if concurrent:
            given = [_given_option(config, concurrent, ranks) for config in configs]
            if measure:
                wanted = [(config, option.layout) for config, option in zip(configs, given, strict=True)]
                table.measure(wanted, flag, progress)
            costs = [table.find(config, option.layout) for config, option in zip(configs, given, strict=True)]
            options = [
                [option._replace(seconds=cost.seconds if cost else 0.0)]
                for option, cost in zip(given, costs, strict=True)
            ]
            resources = Resources(10**9, slots=concurrent)
        else:
            options, resources = [table.options(config) for config in configs], Resources(ranks.size, free_memory())
            check_memory(plan, options, resources)
    if not all(option.seconds for of_run in options for option in of_run):
        return None
    return best_schedule(options, resources), ranks.size


def _given_option(config: RunConfig, concurrent: int, ranks: Ranks) -> Option:
    num_ranks = config.launch.num_processes
    num_cores = max(1, int(available_cores().number))
    threads = given_threads(config) or max(1, num_cores // (concurrent * num_ranks))
    return Option(Layout(num_ranks, threads), num_ranks, 0.0)


def longest_first(plan: Sequence[PlannedRun], warn: Callable[[str], None]) -> list[PlannedRun]:
    """Runs for a Ray cluster: those whose costs were measured on this machine longest first, after the others."""
    table = CostTable(Ranks(max(1, int(available_cores().number))), CostCache(warn))
    seconds = {planned.folder: max(option.seconds for option in table.options(planned.config)) for planned in plan}
    return sorted(plan, key=lambda planned: -seconds[planned.folder] if seconds[planned.folder] else float("-inf"))


def check_memory(plan: Sequence[PlannedRun], options: Sequence[Sequence[Option]], resources: Resources) -> None:
    """Refuse a run that needs more memory than there is.

    Raises:
        UsageError: names the arm.
    """
    for planned, of_run in zip(plan, options, strict=True):
        needed = min(option.memory for option in of_run)
        if needed > resources.memory:
            raise UsageError(
                f"arm {planned.arm} needs {needed / GIB:.1f} GiB of memory, and {resources.memory / GIB:.1f} GiB are "
                "free: choose a smaller batch.micro_size or model, or a machine with more"
            )
