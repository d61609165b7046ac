"""Ranks on a Ray cluster: Ray Train starts them, and restarts them from the last checkpoint after a failure.

The driver is the process of the command, started directly or by `ray job submit`. It waits, shows progress and ends
all ranks; messages of ranks reach it through a small actor. Nothing is reported through Ray Train: `ray.train.report`
makes all ranks wait for each other and for Ray's next poll (2 s), and the run folder, which all nodes share, already
contains everything. Ray is imported only by the functions that need it.
"""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Never, final

from gengap_dist.compat.ray_connection import connects
from gengap_dist.compat.ray_failures import killed_ranks
from gengap_dist.compat.ray_job import started_by_job
from gengap_dist.compat.warnings_as_text import format_warnings
from gengap_dist.config.sections import RESOURCE_STEP, LaunchConfig, MlflowConfig, RunConfig
from gengap_dist.credentials import command_line, printable
from gengap_dist.distributed.cores import available_cores, bounded_wait, threads_per_rank
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed, load_entry_point
from gengap_dist.distributed.preemption import TIME_SIGNALS, Preempted, PreemptionFlag, handling
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.errors import OutOfMemory, UsageError

CONNECT_TIMEOUT_SECONDS = 12.0  # for a cluster to answer
POLL_SECONDS = 0.5  # between two progress messages of rank 0, and between two polls of the driver
WARNING_SECONDS = 60.0  # between two warnings that no rank has started yet
PREEMPTION_SECONDS = 5.0  # between two polls for a preemption notice; Ray itself polls as often

Assignment = tuple[int, int]
"""A run, by its index in the queue, and how often ranks have started it."""
Message = tuple[str, Any]
"""started: world size; progress: run, step, steps, note; result: run, its result; usage: a sentence; failed: rank,
traceback; preempted: step."""


def uses_ray(config: LaunchConfig) -> bool:
    """Whether ranks are started on a Ray cluster.

    Raises:
        UsageError: for launch.launcher=ray under torchrun: each of its ranks would start further ranks.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if config.launcher == "ray" and under_torchrun:
        raise UsageError(
            "launch.launcher (ray) starts ranks itself, but torchrun has already started some: start the command "
            "without torchrun, or choose launch.launcher=auto"
        )
    submitted = started_by_job() and "RAY_ADDRESS" in os.environ
    return config.launcher == "ray" or (config.launcher == "auto" and submitted and not under_torchrun)


def resources_per_rank(config: LaunchConfig) -> dict[str, float]:
    """The resources that Ray reserves for one rank: a CPU, a GPU if it uses one, and launch.resources_per_rank.

    >>> resources_per_rank(LaunchConfig(device="cuda", resources_per_rank={"CPU": 4}))
    {'CPU': 4.0, 'GPU': 1.0}
    >>> resources_per_rank(LaunchConfig(device="cpu"))
    {'CPU': 1.0}
    """
    return {"CPU": 1.0} | ({"GPU": 1.0} if config.device == "cuda" else {}) | config.resources_per_rank


def num_slots(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float], placement: str) -> int:
    """How many ranks fit on nodes with these resources if nothing else runs there.

    >>> nodes = [{"CPU": 4, "GPU": 2}, {"CPU": 8}, {"CPU": 1, "GPU": 8}]
    >>> [num_slots(nodes, {"CPU": 1, "GPU": 1}, placement) for placement in ("PACK", "STRICT_PACK", "STRICT_SPREAD")]
    [3, 2, 2]
    >>> [num_slots([{"GPU": 2}], {"GPU": amount}, "PACK") for amount in (0.1, 0.3333, 0.5, 0.6, 2)]
    [20, 6, 4, 2, 1]
    """
    fit = [min(_num_shares(node.get(name, 0.0), name, amount) for name, amount in resources.items()) for node in nodes]
    match placement:
        case "STRICT_PACK":
            return max(fit, default=0)
        case "STRICT_SPREAD":
            return sum(count > 0 for count in fit)
    return sum(fit)


def _num_shares(total: float, name: str, amount: float) -> int:
    """How many times `amount` of a resource can be reserved; less than one GPU must be of a single GPU."""
    if name == "GPU" and amount < 1:
        return int(total) * _num_shares(1.0, "", amount)
    return round(total / RESOURCE_STEP) // max(1, int(amount / RESOURCE_STEP + 1e-6))


def resolve_device(launches: Sequence[LaunchConfig], nodes: Sequence[Mapping[str, float]]) -> list[LaunchConfig]:
    """The same launches with launch.device=auto replaced by cpu or cuda, for the ranks and for Ray's reservations.

    The driver decides once, after it has connected to the cluster and before any rank starts; the driver's own machine
    does not matter. The decision holds for all restarts and resizings of these ranks (a run that is resumed later
    decides again), and it is the same for all runs of a study, because its arms are compared:
    - cuda, if launch.resources_per_rank names GPU;
    - else cuda, if the nodes that are alive now, counting resources in use, can hold launch.num_processes ranks with a
      GPU each under launch.placement. Ranks up to launch.max_processes then also wait for GPUs;
    - else cpu, and ranks never see a GPU. Nodes that join later do not change that: Ray's autoscaler adds only
      requested resources, so a run that should wait for GPU nodes has to request them (launch.device=cuda).

    Raises:
        UsageError: if launch.device=cpu and launch.resources_per_rank names GPU.

    >>> auto, nodes = LaunchConfig(num_processes=2), [{"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    >>> [resolve_device([auto], nodes[:number])[0].device for number in (1, 2)]
    ['cpu', 'cuda']
    """
    for launch in launches:
        if launch.device == "cpu" and "GPU" in launch.resources_per_rank:
            raise UsageError(
                f"launch.resources_per_rank ({launch.resources_per_rank}) reserves GPUs that ranks with "
                "launch.device=cpu do not use: leave GPU out, or choose launch.device=cuda"
            )
    undecided = [launch for launch in launches if launch.device == "auto" and "GPU" not in launch.resources_per_rank]
    short = [
        launch
        for launch in undecided
        if num_slots(nodes, resources_per_rank(_with_device("cuda", launch)), launch.placement) < launch.num_processes
    ]
    if short and any("GPU" in node for node in nodes):
        _warn(
            f"launch.device (auto) is cpu: launch.num_processes ({short[0].num_processes}) asks for more ranks with a "
            f"GPU than fit on the Ray cluster ({short[0].placement}): choose fewer ranks, or launch.device=cuda, "
            "which waits for more GPUs"
        )

    def device(launch: LaunchConfig) -> str:
        return launch.device if launch.device != "auto" else "cpu" if short and launch in undecided else "cuda"

    return [_with_device(device(launch), launch) for launch in launches]


def _with_device(device: str, launch: LaunchConfig) -> LaunchConfig:
    return launch.model_copy(update={"device": device})


def alive_nodes() -> list[dict[str, float]]:
    """The total resources of each live node of the cluster, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _warn(text: str) -> None:
    print(printable(f"gengap: warning: {text}"), file=sys.stderr, flush=True)


def check_address(address: str) -> bool:
    """Whether a Ray cluster answers at an address; False if the address is "auto" and this machine runs none.

    Args:
        address: host:port, ray://host:port, or auto (the cluster that `ray start` has started on this machine).

    Raises:
        UsageError: if nothing answers within 15 s, or the cluster refuses; the message says what to check.
    """
    plain = address.removeprefix("ray://")
    check = (
        f"check the address, `ray status --address {plain}` on that node, whether a firewall lets its port through "
        "(6379, or 10001 for ray://), and that RAY_AUTH_MODE and the token (RAY_AUTH_TOKEN or ~/.ray/auth_token) are "
        "the cluster's"
    )
    if address != "auto":
        host, _, port = plain.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"launch.ray_address ({address}) is not an address: give host:port or ray://host:port")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3.0).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"launch.ray_address ({address}) cannot be reached ({error}): {check}") from None
    connected, reason = connects(address, CONNECT_TIMEOUT_SECONDS)
    if reason:
        raise UsageError(f"launch.ray_address ({address}) does not lead to a Ray cluster ({reason}): {check}")
    return connected


@final
class RayLauncher(Launcher):
    """Ranks on a Ray cluster. A study starts its own worker groups instead (study/ray_runner.py)."""

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; ranks always continue from the folder's checkpoint, as restarted ranks must.

        Raises:
            UsageError: also if the cluster does not answer, or would delete the folder.
            Preempted: if the ranks were preempted more often than launch.max_failures allows.
        """
        check_folder(out)
        try:
            may_grow = not connect_to_cluster(config.launch)
            with sigterm_as_interrupt():
                queue, results = start_run_queue([(config, out)]), dict[int, Any]()
                (launch,) = resolve_device([config.launch], alive_nodes())
                group = WorkerGroup(
                    uuid.uuid4().hex, config.launch, launch, queue, out / "ray", self.entry_point, command_line()
                )
                on_progress = lambda number, done, total, note: progress(done, total, note)  # noqa: E731
                WorkerGroupRun(group, on_progress, results.__setitem__, config.launch.max_failures).wait(may_grow)
                return results[0]
        except RankFailed:
            raise  # the ranks have ended already
        except BaseException:
            self.close(kill=True)
            raise
        finally:
            shutil.rmtree(out / "ray", ignore_errors=True)

    def close(self, *, kill: bool = False) -> None:
        """Disconnect, or stop the cluster if `run` has started it: Ray then kills all tasks of this process."""
        if "ray" in sys.modules:
            import ray

            ray.shutdown()


def check_folder(out: Path) -> None:
    """Refuse a folder that Ray will delete.

    Raises:
        UsageError: if it is in a job's working directory.
    """
    if "runtime_resources" in out.parts:
        raise UsageError(
            f"--out ({out}) is in Ray's copy of the job's working directory, which is deleted after the job: "
            "give an absolute --out that all nodes share"
        )


def connect_to_cluster(config: LaunchConfig) -> bool:
    """Connect to the cluster, or start a local one that ends with this process. Returns whether it started one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "auto"
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():  # the runs of a study share one connection
            return False
    if address != "local" and not started_by_job() and not check_address(address):
        address = "local"
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before the import: Ray uses loopback only
    import ray

    # For Ray's own processes; output and warnings of ranks still reach the driver's stderr.
    quiet: dict[str, Any] = {"logging_level": "ERROR", "logging_config": ray.LoggingConfig(log_level="ERROR")}
    if address != "local":
        ray.init(address=address, **quiet)
        return False
    needed = resources_per_rank(config)["CPU"] * (config.max_processes or config.num_processes)
    ray.init(
        address="local", num_cpus=max(available_cores().whole, int(-(-needed // 1))), include_dashboard=False, **quiet
    )
    return True


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context in which SIGTERM and its kin raise KeyboardInterrupt: a stopped job still records how its run ended.

    `ray job stop` gives the driver and its children 3 s between SIGTERM and SIGKILL. Enter it after ray.init, which
    installs a handler of its own.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    with handling(TIME_SIGNALS, interrupt):
        yield


class RunQueue:
    """The actor between worker groups and the driver.

    It assigns runs to worker groups, and stores messages until they are polled. A worker group executes one run after
    another; `group` is its name.
    """

    def __init__(self, runs: Sequence[tuple[RunConfig, Path]]) -> None:
        """`runs`: configs and folders; a run is identified by its index."""
        self._runs = runs
        self._waiting = [*range(len(runs))]
        self._assigned: dict[str, Assignment] = {}  # by group
        self._retired: set[str] = set()  # groups
        self._messages: dict[str, list[Message]] = {}

    def assign(
        self, group: str, launch: LaunchConfig | None, unfinished: Assignment | None = None
    ) -> Assignment | None:
        """The group's current run, else `unfinished` of a retired group, else the first run that waits, if any does.

        `launch`: the launch config of that run; None for any.
        """
        if group in self._retired:
            return None
        if group not in self._assigned:
            waiting = (number for number in self._waiting if launch in (None, self._runs[number][0].launch))
            number, num_starts = unfinished or (next(waiting, None), 0)
            if number is None:
                return None
            if not unfinished:
                self._waiting.remove(number)
            self._assigned[group] = number, num_starts
        return self._assigned[group]

    def begin(self, group: str, launch: LaunchConfig) -> int:
        """The run that the group's ranks have to start or continue now; -1 if none is left."""
        assigned = self.assign(group, launch)
        if assigned is None:
            return -1
        number, num_starts = assigned
        self._assigned[group] = number, num_starts + 1
        return number

    def end(self, group: str) -> None:
        """Mark the group's run as finished."""
        self._assigned.pop(group, None)

    def retire(self, group: str) -> Assignment | None:
        """Assign nothing to this group any more: ranks of a process that died may still be ending. Its current run."""
        self._retired.add(group)
        return self._assigned.pop(group, None)

    def run(self, number: int) -> tuple[RunConfig, Path]:
        """The config and folder of a run."""
        return self._runs[number]

    def publish(self, topic: str, kind: str, value: Any) -> None:
        """Store a message under `topic`."""
        self._messages.setdefault(topic, []).append((kind, value))

    def poll(self, topic: str) -> list[Message]:
        """The messages of a topic since the last call."""
        return self._messages.pop(topic, [])


def start_run_queue(runs: Sequence[tuple[RunConfig, Path]]) -> Any:
    """Start a `RunQueue` actor on this node.

    For ranks on other nodes: relative data roots are made absolute, and credentials stay with the driver.
    """
    import ray

    def resolved(config: RunConfig) -> RunConfig:
        data = config.data.model_copy(update={"root": config.data.root.resolve()})
        return config.model_copy(update={"data": data, "mlflow": MlflowConfig(**config.mlflow.model_dump())})

    return ray.remote(RunQueue).options(**on_this_node()).remote([(resolved(config), out) for config, out in runs])


class WorkerGroup(NamedTuple):
    """Ranks with one launch config that take runs from a queue until none is left for them."""

    name: str
    launch: LaunchConfig
    """As in the configs of its runs; the queue assigns runs by it."""
    resolved: LaunchConfig
    """The same with launch.device set to cpu or cuda; see `resolve_device`."""
    queue: Any
    """Handle of the `RunQueue` actor."""
    storage: Path
    """Folder for Ray Train's own files, which are not needed afterwards."""
    entry_point: str
    """The function that every rank calls for a run, as `module:function`."""
    command: Sequence[str]
    """The driver's command line, for run.json."""


class WorkerGroupRun:
    """One Ray Train run of a worker group, as seen by the driver."""

    def __init__(
        self,
        group: WorkerGroup,
        progress: Callable[[int, int, int, str], None],
        on_result: Callable[[int, dict[str, Any]], None],
        max_failures: int,
    ) -> None:
        """Nothing is started before `start` or `wait`.

        Args:
            group: the worker group whose ranks Ray Train starts.
            progress: called with a run's number and its progress.
            on_result: called with a run's number and its result.
            max_failures: how often ranks may be restarted.
        """
        import ray

        self.group, self.progress, self.on_result = group, progress, on_result
        self.task: Any = None
        """Reference of the Ray task that ends with the ranks; None before the start."""
        self.unfinished: Assignment | None = None
        """The run at which the ranks ended, after a failure."""
        self._fit = ray.remote(_fit).options(max_retries=0, **on_this_node())
        self._job = {
            "group": group,
            "max_failures": max_failures,
            "folder": Path.cwd(),
        }
        self._failures: list[Message] = []  # since the latest start of the ranks
        self._num_starts, self._size = 0, 0
        self._last_warning = 0.0

    def start(self, may_grow: bool) -> None:
        """Start the ranks; `may_grow`: whether nodes may still join the cluster; then too few nodes are waited for.

        Raises:
            UsageError: if the nodes are too few and no more can join.
        """
        self._check_capacity(may_grow)
        self.task = self._fit.remote(self._job)

    def poll(self) -> bool:
        """Handle what has happened since the last call; returns whether no run is left and the ranks have ended.

        Raises:
            UsageError: if a rank rejects a run's config.
            RankFailed: if ranks failed and are not restarted.
            Preempted: if ranks were preempted and are not restarted.
        """
        import ray
        from ray.exceptions import OutOfMemoryError, WorkerCrashedError

        if not ray.wait([self.task], timeout=0)[0]:
            self._handle_messages()
            if not self._size and time.monotonic() - self._last_warning > WARNING_SECONDS:
                self._warn("no rank has started yet: waiting for free resources in the Ray cluster (see `ray status`)")
            return False
        failure: tuple[dict[int, str], str] | None
        try:
            failure = ray.get(self.task)
        except (WorkerCrashedError, OutOfMemoryError) as error:
            failure = {}, f"the process that started the ranks died: {' '.join(str(error).split())}"
        self.unfinished = ray.get(self.group.queue.retire.remote(self.group.name))
        self._handle_messages()
        if failure:
            self._raise_failure(failure)
        return True

    def wait(self, may_grow: bool) -> None:
        """`start`, and `poll` until the ranks have ended; see there."""
        import ray

        self.start(may_grow)
        while not self.poll():
            ray.wait([self.task], timeout=POLL_SECONDS)

    def _handle_messages(self) -> None:
        import ray

        for kind, value in ray.get(self.group.queue.poll.remote(self.group.name)):
            match kind:
                case "started":
                    self._on_started(value)
                case "progress":
                    self.progress(*value)
                case "usage":
                    raise UsageError(value)  # the caller ends all ranks; a restart would fail again
                case "result":
                    self.on_result(*value)
                case _:
                    self._failures.append((kind, value))
                    self._size, self._last_warning = 0, time.monotonic()

    def _on_started(self, size: int) -> None:
        self._num_starts += 1
        self._size = size
        if self._num_starts > 1:
            reason = f" after: {_reason(self._failures)}" if self._failures else ""
            self._warn(f"{size} rank(s) restarted from the last checkpoint{reason}")
        self._failures.clear()

    def _raise_failure(self, failure: tuple[dict[int, str], str]) -> Never:
        """Raise the cause of the ranks' end: a rank that was killed, else the first failure that a rank reported."""
        dead, text = failure
        for rank, reason in dead.items():
            raise RankFailed(f"rank {rank} died: {reason}")
        for kind, value in self._failures:
            if kind == "preempted":
                raise Preempted(value)
            raise RankFailed(f"rank {value[0]} failed:\n{value[1]}")
        raise RankFailed(f"Ray could not run the ranks: {text}")

    def _check_capacity(self, may_grow: bool) -> None:
        launch, nodes = self.group.resolved, alive_nodes()
        needs = resources_per_rank(launch)
        fit = num_slots(nodes, needs, launch.placement)
        self._last_warning = time.monotonic()
        if fit < launch.num_processes:
            text = (
                f"launch.num_processes ({launch.num_processes}) asks for more ranks than fit on the Ray cluster: its "
                f"{len(nodes)} node(s) hold {fit} rank(s) of {needs}, {launch.placement}"
            )
            cpu = "launch.device=cpu"
            if "GPU" in launch.resources_per_rank:
                cpu += " without GPU in launch.resources_per_rank"
            if launch.device == "cuda" and not any(node.get("GPU") for node in nodes):
                text, remedy = f"{text}, and none has a GPU", f"choose {cpu}"
            else:
                remedy = "choose fewer ranks or smaller launch.resources_per_rank"
                remedy += f", or {cpu}" if launch.device == "cuda" else ""
            if not may_grow:
                raise UsageError(f"{text}: {remedy}")
            self._warn(f"{text}; waiting for more nodes: add nodes, or {remedy}")

    def _warn(self, text: str) -> None:
        self._last_warning = time.monotonic()
        _warn(text)


def _reason(failures: list[Message]) -> str:
    """The first failure, in one line; a traceback's last line may be any line of a long message."""
    kind, value = failures[0]
    if kind == "preempted":
        return f"preempted at step {value}"
    lines = value[1].strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)), lines[-1])


def on_this_node() -> dict[str, Any]:
    """Options of a task or actor that runs on this node and reserves no resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # with soft=True Ray uses another node for tasks without CPUs, and the run would end with that node
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": node}


def _fit(job: dict[str, Any]) -> tuple[dict[int, str], str] | None:
    """Run Ray Train to its end. Returns None, or the killed ranks with reasons and Ray's error message.

    It is a task on the driver's node. In the driver's main thread, fit would handle Ctrl-C itself and exit with code 0;
    in another thread, a wait in Ray that is still open when the driver disconnects ends the whole process.
    """
    try:
        _trainer(job).fit()
    except Exception as error:
        return killed_ranks(error), str(error)


def _trainer(job: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch, on_gpu = job["group"].resolved, job["group"].resolved.device == "cuda"
    max_workers = launch.max_processes or launch.num_processes
    return TorchTrainer(
        _rank_main,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=max_workers if max_workers == launch.num_processes else (launch.num_processes, max_workers),
            use_gpu=on_gpu,
            resources_per_worker=resources_per_rank(launch),
            placement_strategy=launch.placement,
        ),
        run_config=RayRunConfig(
            name=uuid.uuid4().hex,  # with a known name Ray would restore the state of that run
            storage_path=str(job["group"].storage),
            failure_config=FailureConfig(max_failures=job["max_failures"]),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            # Some releases of Ray hide GPUs from ranks that reserve none. With the others, each such rank would make
            # the first GPU its current device, which takes memory there.
            worker_runtime_env={"env_vars": bounded_wait() | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})},
        ),
        # It cannot bind the group to a GPU (device_id). NCCL then connects at the first collective, on the current GPU,
        # which init_process_group has set.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=launch.timeout_seconds),
    )


# -- on a rank --------------------------------------------------------------------------------------------------------


def _rank_main(job: dict[str, Any]) -> None:
    """The main function of a rank, in a thread of a Ray worker; Ray Train has created the process group."""
    import warnings

    import ray
    import torch

    from gengap_dist.distributed.process_group import init_process_group

    group: WorkerGroup = job["group"]
    name, launch, resolved, queue = group.name, group.launch, group.resolved, group.queue
    reserved = resources_per_rank(resolved)["CPU"]
    threads = threads_per_rank(int(os.environ["LOCAL_WORLD_SIZE"]), launch.threads_per_rank, reserved)
    run, context = load_entry_point(group.entry_point), RuntimeContext("ray", group.command, threads)
    rank = int(os.environ["RANK"])
    if rank != 0:
        warnings.simplefilter("ignore")  # rank 0 shows them
    format_warnings(printable)
    if job["folder"].is_dir():
        os.chdir(job["folder"])  # the driver's: git and modules there are found; Ray's own folder is empty
    torch.set_num_threads(threads.number)  # Ray itself sets 1
    number, last_sent = -1, 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last_sent
        if rank == 0 and (note or done == total or time.monotonic() - last_sent > POLL_SECONDS):
            last_sent = time.monotonic()
            queue.publish.remote(name, "progress", (number, done, total, note))

    def publish(kind: str, value: Any) -> None:
        ray.get(queue.publish.remote(name, kind, value))

    if rank == 0:
        publish("started", int(os.environ["WORLD_SIZE"]))
    try:
        world, flag = init_process_group(resolved.device, resolved.timeout_seconds), _preemption_flag()
        while (number := world.broadcast_int(ray.get(queue.begin.remote(name, launch)) if rank == 0 else 0)) >= 0:
            config, out = ray.get(queue.run.remote(number))
            # the same process group, with a new phase timer for each run
            fresh = init_process_group(resolved.device, resolved.timeout_seconds)
            result = run(
                config, out, resume=True, world=fresh, progress=progress, preemption_requested=flag, context=context
            )
            if rank == 0:
                publish("result", (number, result))
                ray.get(queue.end.remote(name))
    except OutOfMemory as error:
        if not error.reported_elsewhere:
            publish("usage", str(error))
    except UsageError as error:
        publish("usage", str(error))  # without an exception: Ray would restart the ranks
    except Preempted as error:
        publish("preempted", error.step)
        raise RuntimeError(str(error)) from None  # Ray restarts the ranks on the remaining nodes
    except Exception:
        publish("failed", (rank, traceback.format_exc()))
        raise RuntimeError(f"rank {rank} failed") from None  # our own exceptions need not support pickling


def _preemption_flag() -> PreemptionFlag:
    """A flag that is set when Ray is about to remove a node.

    The query makes all ranks wait for each other, so a thread on every rank polls, and steps only read the flag.
    """
    import ray.train

    flag = PreemptionFlag()

    def poll() -> None:
        while ray.train.get_preemption_info() is None:
            time.sleep(PREEMPTION_SECONDS)
        flag.set(0)

    threading.Thread(target=poll, daemon=True).start()
    return flag
