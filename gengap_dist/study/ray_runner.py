"""Runs a study concurrently on a Ray cluster: each Ray Tune trial starts a worker group that executes several runs.

The ranks of a worker group are started once, by Ray Train, and take runs from a queue until none is left for their
launch settings. A trial itself uses no cluster resources, only its ranks do, and the number of concurrent trials is
limited to the ranks that fit. So trials never wait for resources held by other trials. Results are read from
run folders: nothing is reported through Ray Tune, and its own files are deleted. Ray is imported by the functions that
need it.
"""

import contextlib
import io
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.launchers.base import RankFailed
from gengap_dist.distributed.launchers.ray import (
    POLL_SECONDS,
    RayLauncher,
    WorkerGroup,
    WorkerGroupRun,
    alive_nodes,
    check_folder,
    connect_to_cluster,
    num_slots,
    on_this_node,
    resolve_device,
    resources_per_rank,
    sigterm_as_interrupt,
    start_run_queue,
)
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import UsageError
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback
from gengap_dist.training import ENTRY_POINT

STUDY = "study"  # topic of the messages about all runs
MAX_TRIAL_FAILURES = 3  # of the process of a trial; each failure also ends the active run


class _TrialJob(NamedTuple):
    """Arguments of every trial."""

    launches: Sequence[tuple[LaunchConfig, LaunchConfig]]
    """For each worker group: launch settings as configured, and with the resolved device."""
    run_queue: Any
    storage: Path
    wait_for_nodes: bool
    """Whether to wait for nodes that have not joined yet."""
    folder: Path
    command: Sequence[str]


def concurrency(
    launches: Sequence[LaunchConfig], nodes: Sequence[Mapping[str, float]], max_concurrent: int | None
) -> int:
    """How many runs fit on the cluster at a time, whichever they are; at least 1, which then waits for nodes.

    >>> nodes, small, large = [{"CPU": 8.0}], LaunchConfig(num_processes=2), LaunchConfig(num_processes=3)
    >>> concurrency([small], nodes, None), concurrency([small, large], nodes, None), concurrency([small], nodes, 3)
    (4, 2, 3)
    """
    capacities = [
        num_slots(nodes, resources_per_rank(launch), launch.placement) // launch.num_processes for launch in launches
    ]
    return max(1, min([*capacities, *([max_concurrent] if max_concurrent else [])]))


def run_all(plan: Sequence[PlannedRun], callback: StudyCallback, max_concurrent: int | None) -> int:
    """Execute the plan; returns the number of runs that failed. A failed or diverged run does not stop the others.

    Args:
        plan: the runs, none of which is finished.
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
    outcomes: dict[int, str] = {}
    try:
        wait_for_nodes = not connect_to_cluster(largest)
        with sigterm_as_interrupt():
            _run_trials(plan, callback, wait_for_nodes, storage, max_concurrent, outcomes)
    except BaseException as error:
        RayLauncher(ENTRY_POINT).close(kill=True)
        for planned in plan:
            _close(planned, error)
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    for number in set(range(len(plan))) - outcomes.keys():  # the process of its trial died
        _close(plan[number], RankFailed("the process that started the ranks died"))
        started = plan[number].folder.exists()
        status = run_folder.read_info(plan[number].folder).status if started else RunStatus.FAILED
        outcomes[number] = status if status.has_result else "failed: the process that started the ranks died"
        callback.on_run_end(plan[number], outcomes[number])
    return sum(note.startswith(RunStatus.FAILED) for note in outcomes.values())


def _close(planned: PlannedRun, error: BaseException) -> None:
    if planned.folder.exists():
        run_folder.close_abandoned(planned.folder, error)


def _run_trials(
    plan: Sequence[PlannedRun],
    callback: StudyCallback,
    wait_for_nodes: bool,
    storage: Path,
    max_concurrent: int | None,
    outcomes: dict[int, str],
) -> None:
    """Run all trials and pass their messages to `callback`; fills `outcomes`: run number to status or error."""
    import ray

    nodes = alive_nodes()
    run_queue = start_run_queue([(planned.config, planned.folder) for planned in plan])
    configured = [planned.config.launch for planned in plan]
    resolved = resolve_device(configured, nodes)
    num_concurrent, group_launches = (
        concurrency(resolved, nodes, max_concurrent),
        list[tuple[LaunchConfig, LaunchConfig]](),
    )
    for launches in zip(configured, resolved, strict=True):
        if group_launches.count(launches) < num_concurrent:
            group_launches.append(launches)
    job = _TrialJob(group_launches, run_queue, storage, wait_for_nodes, Path.cwd(), sys.orig_argv)
    task = ray.remote(_tune).options(max_retries=0, **on_this_node()).remote(job, num_concurrent)
    done = False
    while not done:
        done = bool(ray.wait([task], timeout=POLL_SECONDS)[0])
        for kind, value in ray.get(run_queue.poll.remote(STUDY)):
            match kind:
                case "progress":
                    number, *step = value
                    callback.on_step(plan[number], *step)
                case "over":
                    number, outcomes[number] = value
                    callback.on_run_end(plan[number], outcomes[number])
                case "preempted":
                    raise Preempted(value)
                case _:
                    raise UsageError(value)
    ray.get(task)


# -- in Ray processes on the driver's node ----------------------------------------------------------------------------


def _tune(job: _TrialJob, num_concurrent: int) -> None:
    """Run Ray Tune. It is a Ray task because in the driver's main thread Ray Tune would handle Ctrl-C itself."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a dead process is reported by `run_all`
    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    name = next(name for name in node["Resources"] if name.startswith("node:") and not name.startswith("node:__"))

    def trial(choice: dict[str, int]) -> None:
        _trial(job, choice["number"])

    tuner = tune.Tuner(
        tune.with_resources(
            trial, {"cpu": 0, name: 1e-4}
        ),  # the node's name is a Ray resource; it pins the trial to this node
        param_space={"number": tune.grid_search(list(range(len(job.launches))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=num_concurrent, reuse_actors=True),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(job.storage),
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            verbose=0,
        ),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # verbose=0 still prints the path of the files
        tuner.fit()


def _trial(job: _TrialJob, number: int) -> None:
    """Start a worker group, and execute runs until none is left for it."""
    import ray

    group = WorkerGroup(uuid.uuid4().hex, *job.launches[number], job.run_queue, job.storage, ENTRY_POINT, job.command)
    os.chdir(job.folder)  # the driver's: settings may contain relative paths

    def folder(run: int) -> Path:
        return ray.get(group.queue.run.remote(run))[1]

    def send(kind: str, value: Any) -> None:
        ray.get(group.queue.publish.remote(STUDY, kind, value))

    def progress(run: int, done: int, total: int, note: str) -> None:
        group.queue.publish.remote(STUDY, "progress", (run, done, total, note))

    def over(run: int, result: dict[str, Any]) -> None:
        send("over", (run, run_folder.read_info(folder(run)).status))

    def next_run() -> tuple[int, int] | None:
        return ray.get(group.queue.assign.remote(group.name, group.launch))  # (run number, number of earlier starts)

    try:
        while current := next_run():
            try:
                WorkerGroupRun(group, progress, over, group.launch.max_failures - current[1]).wait(job.wait_for_nodes)
            except (RankFailed, Preempted) as error:
                after = next_run()
                if after is None or (after != current and after[1] <= group.launch.max_failures):
                    continue  # the failure belongs to an earlier run
                if isinstance(error, Preempted):
                    return send("preempted", error.step)
                if folder(after[0]).exists():
                    run_folder.close_abandoned(folder(after[0]), error)
                ray.get(group.queue.end.remote(group.name))
                send("over", (after[0], f"failed: {str(error).strip().splitlines()[-1]}"))
    except UsageError as error:
        send("usage", str(error))
