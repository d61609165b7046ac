"""Runs of a study side by side on one machine, as `schedule` says, on ranks that stay.

With study.concurrent=auto the layouts and the order follow from a few measured steps of each distinct run.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cgroups import free_memory
from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.launchers.local import execute_run
from gengap_dist.distributed.preemption import Preempted, PreemptionFlag, catching_signals
from gengap_dist.distributed.worker_pool import Worker
from gengap_dist.errors import OutOfMemory, UsageError
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study.costs import GIB, CostTable, measure_what_matters
from gengap_dist.study.layouts import given_threads, with_ranks
from gengap_dist.study.ranks import Ranks, Task, drive, ranks_of_this_machine
from gengap_dist.study.run_matrix import Forecast, PlannedRun, StudyCallback, first_configs
from gengap_dist.study.schedule import Layout, Option, Placed, Resources, best_schedule, length, placed
from gengap_dist.training import ENTRY_POINT
from gengap_dist.training.run_cost import ArmFacts, CostCache

MIN_SHARE = 0.1  # of a run that says how long others may take
LOOK_SECONDS = 1.0  # while cores are free and the next run waits for more of them
FORECAST_SECONDS = 1.0  # between two forecasts of the time left


Expectation = Callable[[str, Option], float]
"""Seconds of a run of an arm in a layout, by all that is known now."""


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
        # (1 - share) of what the cost says, and share of what the steps say: elapsed (1 - share) / share
        return (1 - share) * (by_cost + elapsed) if share > 0 else by_cost


@final
class Packer:
    """Executes the runs of a study side by side."""

    def __init__(
        self,
        plan: Sequence[PlannedRun],
        callback: StudyCallback,
        options: Sequence[Sequence[Option]],
        resources: Resources,
        later: Sequence[tuple[str, Sequence[Option]]] = (),
    ) -> None:
        """Runs, and the options of each; no run has started.

        Args:
            plan: the runs.
            callback: called on every step and at the end of every run.
            options: of each run.
            resources: of the machine.
            later: (arm, options) of the runs that come after these, for the forecast of the time left.
        """
        self.plan, self.callback, self.options, self.resources = plan, callback, options, resources
        self.later = later
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
        expected = self._expectation()
        running = self._running(expected)
        if not running or sum(option.cores for _, option in running) < self.resources.cores:
            waiting = [self._options(number, expected) for number in self.waiting]
            schedule = best_schedule(waiting, self.resources, running)
            self._due = [(self.waiting[run.number], run.option) for run in schedule if run.start == 0.0]
        if not self._due:
            self._look_at = time.monotonic() + LOOK_SECONDS
            return None
        return self._start(*self._due.pop(0))

    def _running(self, expected: Expectation) -> list[tuple[float, Option]]:
        """(seconds until its end, option) of each active run."""
        return [(run.left(expected(run.planned.arm, run.task.option)), run.task.option) for run in self.active.values()]

    def _options(self, number: int, expected: Expectation) -> list[Option]:
        """The options of a run, with the seconds that are expected now."""
        return _expected_options(self.plan[number].arm, self.options[number], expected)

    def _expectation(self) -> Expectation:
        """Seconds of a run of an arm: as measured, times how much longer runs take that have ended, or have come far.

        Runs of the same arm say it best; without one, all do.
        """
        known = {arm: [*pairs] for arm, pairs in self._known.items()}
        for run in self.active.values():
            if run.share > MIN_SHARE:
                known.setdefault(run.planned.arm, []).append((run.task.option.seconds, run.seconds))
        sums = {arm: (*map(sum, zip(*pairs, strict=True)), len(pairs)) for arm, pairs in known.items()}
        of_all = tuple(map(sum, zip(*sums.values(), strict=True)))

        def expected(arm: str, option: Option) -> float:
            if not sums:
                return option.seconds
            measured, actual, number = sums.get(arm, of_all)
            return option.seconds * actual / measured if option.seconds and measured else actual / number

        return expected

    def _start(self, number: int, option: Option) -> Task:
        planned = self.plan[number]
        self.waiting.remove(number)
        run_folder.prepare_folder(planned.folder, "run.json", resume=True)
        config = with_ranks(planned.config, option.layout.ranks)
        task = Task(
            option,
            execute_run,
            (ENTRY_POINT, config, planned.folder, True, True),
            on_message=partial(self._on_message, number),
            on_result=partial(self._on_result, number),
            on_failure=partial(self._on_failure, number),
            can_stop=True,
        )
        self.active[number] = Active(planned, task)
        return task

    def _on_message(self, number: int, message: tuple[int, int, str] | str) -> None:
        run = self.active[number]
        if isinstance(message, str):
            self.callback.on_core_wait(run.planned, message)
            return
        done, total, note = message
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
        """Forecast of the seconds until all runs have ended, also the later ones; None if nothing is known yet."""
        expected = self._expectation()
        waiting = [_on_fewest_cores(self._options(number, expected)) for number in self.waiting]
        later = [_on_fewest_cores(_expected_options(arm, options, expected)) for arm, options in self.later]
        if not all(option.seconds for option in (*waiting, *later)):
            return None
        running = self._running(expected)
        return length(placed(waiting, self.resources, running), running) + length(placed(later, self.resources))


def _expected_options(arm: str, options: Sequence[Option], expected: Expectation) -> list[Option]:
    return [option._replace(seconds=expected(arm, option)) for option in options]


def _on_fewest_cores(options: Sequence[Option]) -> Option:
    return min(options, key=lambda option: option.cores)


def run_packed(
    plan: Sequence[PlannedRun],
    callback: StudyCallback,
    concurrent: int | None,
    warn: Callable[[str], None],
    later: Sequence[PlannedRun] = (),
    *,
    arms: Mapping[str, RunConfig] | None = None,
    dry_run: bool = False,
) -> int:
    """Check all arms, then execute runs on this machine; returns the number of runs that failed.

    Args:
        plan: the runs, none of which is finished.
        callback: called on every step and at the end of every run.
        concurrent: number of runs at once, each on launch.num_processes ranks; None: see the module.
        warn: called with one sentence.
        later: the runs of the study that come after these, as far as they are known.
        arms: all arms of the study, which are checked; None: those of these runs.
        dry_run: check and measure the runs, and execute none.
    """
    every = [*plan, *later]
    configs = [planned.config for planned in every]
    with catching_signals() as flag, ranks_of_this_machine(configs, os.environ) as ranks:
        _download(configs, ranks)
        check = partial(_on_ranks, ranks, job=check_arms, argument=arms or first_configs(every))
        if concurrent:
            options = [[_given_option(config, concurrent, ranks)] for config in configs]
            callback.on_checked(check(options[0][0].layout))
            _check_gpus(configs, concurrent, ranks)
            resources = Resources(10**9, slots=concurrent)
        else:
            table = CostTable(ranks, CostCache(warn))
            callback.on_checked(check(table.layouts(configs[0])[0]))
            measure_what_matters(table, configs, flag, callback.on_measure)
            options = [table.options(config) for config in configs]
            resources = Resources(ranks.size, free_memory())
            check_memory(every, options, resources)
        arms_of_later = [planned.arm for planned in later]
        of_later = [*zip(arms_of_later, options[len(plan) :], strict=True)]
        packer = Packer(plan, callback, options[: len(plan)], resources, of_later)
        callback.on_forecast(Forecast(packer.seconds_left(), _memory_by_arm(every, options)))
        return 0 if dry_run else packer.run(ranks, flag)


def _download(configs: Sequence[RunConfig], ranks: Ranks) -> None:
    """Download each data set once, before several runs want it."""
    wanted = {config.data.model_dump_json(): config for config in configs if config.data.download}
    for config in wanted.values():
        _on_ranks(ranks, Layout(1, 1), load_data, config)


def _on_ranks(ranks: Ranks, layout: Layout, job: Callable[..., Any], argument: Any) -> Any:
    """What rank 0 returns of a job; the ranks stay for the runs."""
    pool = ranks.take(layout)
    result = pool(job, argument)[0]
    ranks.give_back(pool)
    return result


def check_arms(worker: Worker, arms: Mapping[str, RunConfig]) -> dict[str, ArmFacts]:
    """The job that checks all arms, see `training.arm_check`; the rank keeps the data for its runs."""
    from gengap_dist.training.arm_check import check_arms

    return check_arms(arms, worker.context)


def _memory_by_arm(plan: Sequence[PlannedRun], options: Sequence[Sequence[Option]]) -> dict[str, int]:
    """Of the option that needs least, by arm, where it is known."""
    memory = {planned.arm: min(option.memory for option in each) for planned, each in zip(plan, options, strict=True)}
    return {arm: num_bytes for arm, num_bytes in memory.items() if num_bytes}


def load_data(worker: Worker, config: RunConfig) -> None:
    """The job that reads a data set, and downloads it if it is not there."""
    from gengap_dist.data import datasets

    datasets.load(config.data, lambda label, done, total: None, seed=config.seed)


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
    on_measure: Callable[[int, int], None] | None,
    warn: Callable[[str], None],
) -> list[Placed] | None:
    """The schedule of a study on this machine; None if a cost is not known.

    Args:
        plan: the runs.
        concurrent: as for `run_packed`.
        num_gpus: that ranks can use.
        on_measure: measure the costs that are not known, and call this with the number of measurements done and of
            all; None: do not measure.
        warn: called with one sentence.
    """
    if not plan:
        return []
    configs = [planned.config for planned in plan]
    ranks = Ranks(available_cores().whole, [*map(str, range(num_gpus))])
    with catching_signals() as flag, closing(ranks):
        table = CostTable(ranks, CostCache(warn))
        if on_measure:
            measure_what_matters(table, configs, flag, on_measure)
        if concurrent:
            given = [_given_option(config, concurrent, ranks) for config in configs]
            if on_measure:
                wanted = [(config, option.layout) for config, option in zip(configs, given, strict=True)]
                table.measure(wanted, flag, on_measure)
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
    return best_schedule(options, resources)


def _given_option(config: RunConfig, concurrent: int, ranks: Ranks) -> Option:
    num_ranks = config.launch.num_processes
    num_cores = available_cores().whole
    threads = given_threads(config) or max(1, num_cores // (concurrent * num_ranks))
    return Option(Layout(num_ranks, threads), num_ranks, 0.0)


def longest_first(plan: Sequence[PlannedRun], warn: Callable[[str], None]) -> list[PlannedRun]:
    """Runs for a Ray cluster: those whose costs were measured on this machine longest first, after the others."""
    table = CostTable(Ranks(available_cores().whole), CostCache(warn))
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
