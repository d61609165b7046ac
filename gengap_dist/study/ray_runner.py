"""Runs a study concurrently on a Ray cluster: worker groups that execute one run after another.

The ranks of a worker group are started once, by Ray Train, and take runs from a queue until none is left for their
launch settings. Only ranks reserve resources of the cluster, and the number of worker groups is limited to what fits,
so no run waits for resources held by another. The driver itself waits for all worker groups. Results are read from run
folders; Ray's own files are deleted. Ray is imported by the functions that need it.
"""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.credentials import command_line
from gengap_dist.distributed.launchers.base import RankFailed
from gengap_dist.distributed.launchers.ray import (
    POLL_SECONDS,
    Assignment,
    RayLauncher,
    WorkerGroup,
    WorkerGroupRun,
    alive_nodes,
    check_folder,
    connect_to_cluster,
    num_slots,
    resolve_device,
    resources_per_rank,
    sigterm_as_interrupt,
    start_run_queue,
)
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.runs import run_folder
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback
from gengap_dist.training import ENTRY_POINT


def concurrency(
    launches: Sequence[LaunchConfig], nodes: Sequence[Mapping[str, float]], max_concurrent: int | None
) -> int:
    """How many runs fit on the cluster at a time, whichever they are; at least 1, which then waits for nodes.

    >>> nodes, small, large = [{"CPU": 8.0}], LaunchConfig(num_processes=2), LaunchConfig(num_processes=3)
    >>> concurrency([small], nodes, None), concurrency([small, large], nodes, None), concurrency([small], nodes, 3)
    (4, 2, 3)
    >>> nodes, launch = [{"CPU": 8.0, "GPU": 2.0}], LaunchConfig(device="cuda", resources_per_rank={"GPU": 0.25})
    >>> concurrency([launch], nodes, None)
    8
    """

    def capacity(launch: LaunchConfig) -> int:
        placement = launch.placement if launch.num_processes > 1 else "PACK"  # a single rank may be on any node
        return num_slots(nodes, resources_per_rank(launch), placement) // launch.num_processes

    capacities = [capacity(launch) for launch in launches]
    return max(1, min([*capacities, *([max_concurrent] if max_concurrent else [])]))


def run_all(plan: Sequence[PlannedRun], callback: StudyCallback, max_concurrent: int | None) -> int:
    """Execute the plan; returns the number of runs that failed. A failed or diverged run does not stop the others.

    Args:
        plan: the runs, none of which is finished, in the order in which they are started.
        callback: called on every step and at the end of every run.
        max_concurrent: limit of concurrent runs; None for as many as fit.

    Raises:
        UsageError: if the cluster does not answer, or a rank reports an error in its config.
        Preempted: if a run was preempted more often than launch.max_failures allows.
    """
    storage = plan[0].folder.parents[2] / "ray"
    check_folder(storage)
    launches = [planned.config.launch for planned in plan]
    largest = max(launches, key=lambda launch: launch.num_processes * resources_per_rank(launch)["CPU"])
    try:
        may_grow = not connect_to_cluster(largest)
        with sigterm_as_interrupt():
            return _Study(plan, callback, may_grow, storage).run(max_concurrent)
    except BaseException as error:
        RayLauncher(ENTRY_POINT).close(kill=True)
        for planned in plan:
            _close(planned, error)
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _close(planned: PlannedRun, error: BaseException) -> None:
    if planned.folder.exists():
        run_folder.close_abandoned(planned.folder, error)


@final
class _Study:
    """The worker groups of a study, and the runs that they execute."""

    def __init__(self, plan: Sequence[PlannedRun], callback: StudyCallback, may_grow: bool, storage: Path) -> None:
        self.plan, self.callback, self.may_grow, self.storage = plan, callback, may_grow, storage
        self.nodes = alive_nodes()
        self.queue = start_run_queue([(planned.config, planned.folder) for planned in plan])
        self.resolved = resolve_device([planned.config.launch for planned in plan], self.nodes)
        self.groups: dict[WorkerGroupRun, Assignment] = {}  # the run that each was started with
        self.num_failed = 0

    def run(self, max_concurrent: int | None) -> int:
        """Start the worker groups, and wait until all runs have ended; returns the number of runs that failed."""
        import ray

        for _ in range(concurrency(self.resolved, self.nodes, max_concurrent)):
            self._start_group()
        while self.groups:
            ray.wait([group.task for group in self.groups], timeout=POLL_SECONDS)
            for group in [*self.groups]:
                unfinished = None
                try:
                    if not group.poll():
                        continue
                except (RankFailed, Preempted) as error:
                    unfinished = self._after_failure(group, error)
                del self.groups[group]
                self._start_group(unfinished)
        return self.num_failed

    def _start_group(self, unfinished: Assignment | None = None) -> None:
        """Start a worker group for an unfinished run, else for the first run that waits, if there is one."""
        import ray

        name = uuid.uuid4().hex
        assigned: Assignment | None = ray.get(self.queue.assign.remote(name, None, unfinished))
        if assigned is None:
            return
        number, num_starts = assigned
        launch = self.plan[number].config.launch
        group = WorkerGroupRun(
            WorkerGroup(name, launch, self.resolved[number], self.queue, self.storage, ENTRY_POINT, command_line()),
            self._on_step,
            self._on_result,
            launch.max_failures - num_starts,
        )
        group.start(self.may_grow)
        self.groups[group] = assigned

    def _after_failure(self, group: WorkerGroupRun, error: RankFailed | Preempted) -> Assignment | None:
        """The run to continue in a new group, after the ranks of one have failed; None if its run has failed, too.

        Ray Train counts the failures of all runs of a group; each run may fail launch.max_failures times.

        Raises:
            Preempted: if the ranks were preempted too often.
        """
        if group.unfinished is None:
            return None
        number, num_starts = group.unfinished
        planned = self.plan[number]
        if group.unfinished != self.groups[group] and num_starts <= planned.config.launch.max_failures:
            return group.unfinished
        if isinstance(error, Preempted):
            raise error
        _close(planned, error)
        self.num_failed += 1
        self.callback.on_run_end(planned, f"failed: {str(error).strip().splitlines()[-1]}")
        return None

    def _on_step(self, number: int, done: int, total: int, note: str) -> None:
        self.callback.on_step(self.plan[number], done, total, note)

    def _on_result(self, number: int, result: dict[str, Any]) -> None:
        self.callback.on_run_end(self.plan[number], run_folder.read_info(self.plan[number].folder).status)
