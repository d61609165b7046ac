"""The runs of a study side by side on a Ray cluster: Ray Tune trials, each of which lets a team of ranks do runs.

A team's ranks are started once, by Ray Train, and take runs one after another until none is left for their kind.
A trial takes nothing of the cluster, only its ranks do, and at most as many trials run as there is room for the ranks
of. So trials never wait for what other trials hold. Run folders are the truth: nothing is reported through Ray Tune,
and what it keeps for itself is thrown away. Ray is imported by the functions that need it.
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
    connect,
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
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback
from gengap_dist.training import ENTRY_POINT

STUDY = "study"  # what news of all runs are about
MOST_DEATHS = 3  # of a process that waits for ranks; each takes the run that was under way along


class _Job(NamedTuple):
    """What every trial is told."""

    launches: Sequence[tuple[LaunchConfig, LaunchConfig]]
    """Of every team: as its runs have it, and with the device that was resolved."""
    teller: Any
    storage: Path
    grows: bool
    """Whether to wait for nodes that are not there yet."""
    folder: Path
    command: Sequence[str]


def concurrency(launches: Sequence[LaunchConfig], nodes: Sequence[Mapping[str, float]], most: int | None) -> int:
    """How many runs find room at a time, whichever of them they are; at least 1, which then waits for nodes.

    >>> nodes, small, large = [{"CPU": 8.0}], LaunchConfig(num_processes=2), LaunchConfig(num_processes=3)
    >>> concurrency([small], nodes, None), concurrency([small, large], nodes, None), concurrency([small], nodes, 3)
    (4, 2, 3)
    """
    rooms = [
        num_slots(nodes, resources_per_rank(launch), launch.placement) // launch.num_processes for launch in launches
    ]
    return max(1, min([*rooms, *([most] if most else [])]))


def run_all(plan: Sequence[PlannedRun], watch: StudyCallback, most: int | None) -> int:
    """Run all of the plan; the number of runs that failed. A run that fails or diverges does not stop the others.

    Args:
        plan: the runs, none of which is finished.
        watch: told of every step.
        most: runs at a time, if fewer than there is room for.

    Raises:
        UsageError: if the cluster does not answer, or what a rank found wrong with its config.
        Preempted: if a run's ranks had to leave more often than launch.max_failures lets them start again.
    """
    storage = plan[0].folder.parents[2] / "ray"
    check_folder(storage)
    launches = [cell.config.launch for cell in plan]
    largest = max(launches, key=lambda launch: launch.num_processes * resources_per_rank(launch)["CPU"])
    heard: dict[int, str] = {}
    try:
        grows = not connect(largest)
        with sigterm_as_interrupt():
            _wait(plan, watch, grows, storage, most, heard)
    except BaseException as error:
        RayLauncher(ENTRY_POINT).close(kill=True)
        for cell in plan:
            _close(cell, error)
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    for number in set(range(len(plan))) - heard.keys():  # the process that waited for its ranks died
        _close(plan[number], RankFailed("the process that started the ranks died"))
        status = (
            run_folder.read_info(plan[number].folder)["status"] if plan[number].folder.exists() else run_folder.FAILED
        )
        heard[number] = status if status in run_folder.ENDED else "failed: the process that started the ranks died"
        watch.on_run_end(plan[number], heard[number])
    return sum(note.startswith(run_folder.FAILED) for note in heard.values())


def _close(cell: PlannedRun, error: BaseException) -> None:
    if cell.folder.exists():
        run_folder.close_abandoned(cell.folder, error)


def _wait(
    plan: Sequence[PlannedRun],
    watch: StudyCallback,
    grows: bool,
    storage: Path,
    most: int | None,
    heard: dict[int, str],
) -> None:
    """Let all trials run, and tell `watch` what they tell; `heard` gets how they ended, by number."""
    import ray

    nodes = alive_nodes()
    teller = start_run_queue([(cell.config, cell.folder) for cell in plan])
    given = [cell.config.launch for cell in plan]
    resolved = resolve_device(given, nodes)
    num, teams = concurrency(resolved, nodes, most), list[tuple[LaunchConfig, LaunchConfig]]()
    for launches in zip(given, resolved, strict=True):
        if teams.count(launches) < num:
            teams.append(launches)
    job = _Job(teams, teller, storage, grows, Path.cwd(), sys.orig_argv)
    task = ray.remote(_tune).options(max_retries=0, **on_this_node()).remote(job, num)
    over = False
    while not over:
        over = bool(ray.wait([task], timeout=POLL_SECONDS)[0])
        for kind, value in ray.get(teller.hear.remote(STUDY)):
            match kind:
                case "progress":
                    number, *step = value
                    watch.on_step(plan[number], *step)
                case "over":
                    number, heard[number] = value
                    watch.on_run_end(plan[number], heard[number])
                case "preempted":
                    raise Preempted(value)
                case _:
                    raise UsageError(value)
    ray.get(task)


# -- in processes of Ray's, on the driver's node ----------------------------------------------------------------------


def _tune(job: _Job, num_concurrent: int) -> None:
    """Ray Tune, from start to end: a task, because in the driver's main thread it would take Ctrl-C for itself."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a process that died is told of in our own words
    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    name = next(name for name in node["Resources"] if name.startswith("node:") and not name.startswith("node:__"))

    def trial(choice: dict[str, int]) -> None:
        _trial(job, choice["number"])

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0, name: 1e-4}),  # this node's name is a resource that nobody else takes
        param_space={"number": tune.grid_search(list(range(len(job.launches))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=num_concurrent, reuse_actors=True),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(job.storage),
            failure_config=tune.FailureConfig(max_failures=MOST_DEATHS),
            verbose=0,
        ),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # verbose=0 still says where the files are that nobody wants
        tuner.fit()


def _trial(job: _Job, number: int) -> None:
    """A team, until no run is left for it."""
    import ray

    team = WorkerGroup(uuid.uuid4().hex, *job.launches[number], job.teller, job.storage, ENTRY_POINT)
    os.chdir(job.folder)  # the driver's: settings may hold paths that start there
    sys.orig_argv = [*job.command]

    def folder(run: int) -> Path:
        return ray.get(team.queue.run.remote(run))[1]

    def tell(kind: str, value: Any) -> None:
        ray.get(team.queue.tell.remote(STUDY, kind, value))

    def progress(run: int, done: int, total: int, note: str) -> None:
        team.queue.tell.remote(STUDY, "progress", (run, done, total, note))

    def over(run: int, result: dict[str, Any]) -> None:
        tell("over", (run, run_folder.read_info(folder(run))["status"]))

    def given() -> tuple[int, int] | None:
        return ray.get(team.queue.give.remote(team.name, team.launch))  # a run, and how often it was begun

    try:
        while before := given():
            try:
                WorkerGroupRun(team, progress, over, team.launch.max_failures - before[1]).wait(job.grows)
            except (RankFailed, Preempted) as error:
                now = given()
                if now is None or (now != before and now[1] <= team.launch.max_failures):
                    continue  # what has failed before it was another run
                if isinstance(error, Preempted):
                    return tell("preempted", error.step)
                if folder(now[0]).exists():
                    run_folder.close_abandoned(folder(now[0]), error)
                ray.get(team.queue.end.remote(team.name))
                tell("over", (now[0], f"failed: {str(error).strip().splitlines()[-1]}"))
    except UsageError as error:
        tell("usage", str(error))
