"""Ranks from a Ray cluster: Ray Train starts them, and starts them again from the last checkpoint when some have died.

The driver is the process that was given the command, on its own or under `ray job submit`. It waits, shows progress
and ends everything; what ranks have to say reaches it through a small actor. Nothing is reported through Ray Train:
`ray.train.report` makes all ranks wait for each other and for Ray's next look at them (2 s), and the run folder, which
all nodes share, holds everything already. Ray is imported by the functions that need it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
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

from gengap_dist.config.sections import LaunchConfig, RunConfig
from gengap_dist.distributed.launchers.base import Launcher, Progress, RankFailed, load_entry_point
from gengap_dist.distributed.preemption import Preempted, PreemptionFlag
from gengap_dist.errors import OutOfMemory, UsageError

ANSWER_SECONDS = 12.0  # for a cluster to answer before it counts as silent
POLL_SECONDS = 0.5  # between two words from rank 0, and between two looks of the driver
WAITING_SECONDS = 60.0  # between two warnings that no rank has started yet
PREEMPTION_SECONDS = 5.0  # between two looks for a preemption notice; Ray itself looks as often

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what `ray job submit` sets for the process it starts, and for no other
_NO_CLUSTER = 3  # exit code of _CONNECT where "auto" finds nothing
_CONNECT = f"""
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except ConnectionError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_CLUSTER} if sys.argv[1] == "auto" and "find any running" in str(error) else 1)
"""

Message = tuple[str, Any]
"""started: world size; progress: run, step, steps, note; result: run, its result; usage: a sentence; failed: rank,
traceback; preempted: step."""


def uses_ray(config: LaunchConfig) -> bool:
    """Whether a Ray cluster is to give the ranks.

    Raises:
        UsageError: for launch.launcher=ray on ranks that torchrun has started: each would ask for ranks of its own.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if config.launcher == "ray" and under_torchrun:
        raise UsageError(
            "launch.launcher (ray) starts ranks, and torchrun has started some already: start the command without "
            "torchrun, or choose launch.launcher=auto"
        )
    submitted = JOB in os.environ and "RAY_ADDRESS" in os.environ
    return config.launcher == "ray" or (config.launcher == "auto" and submitted and not under_torchrun)


def resources_per_rank(config: LaunchConfig) -> dict[str, float]:
    """What Ray sets aside for one rank: a CPU, a GPU if it computes on one, and what launch.resources_per_rank says.

    >>> resources_per_rank(LaunchConfig(device="cuda", resources_per_rank={"CPU": 4}))
    {'CPU': 4.0, 'GPU': 1.0}
    >>> resources_per_rank(LaunchConfig(device="cpu"))
    {'CPU': 1.0}
    """
    return {"CPU": 1.0} | ({"GPU": 1.0} if config.device == "cuda" else {}) | config.resources_per_rank


def num_slots(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float], placement: str) -> int:
    """How many ranks fit on nodes with these resources when nothing else runs there.

    >>> nodes = [{"CPU": 4, "GPU": 2}, {"CPU": 8}, {"CPU": 1, "GPU": 8}]
    >>> [num_slots(nodes, {"CPU": 1, "GPU": 1}, placement) for placement in ("PACK", "STRICT_PACK", "STRICT_SPREAD")]
    [3, 2, 2]
    """
    fit = [min(int(node.get(name, 0.0) / amount) for name, amount in resources.items()) for node in nodes]
    match placement:
        case "STRICT_PACK":
            return max(fit, default=0)
        case "STRICT_SPREAD":
            return sum(count > 0 for count in fit)
    return sum(fit)


def resolve_device(launches: Sequence[LaunchConfig], nodes: Sequence[Mapping[str, float]]) -> list[LaunchConfig]:
    """The same launches with cpu or cuda for launch.device=auto: what their ranks are to use and Ray to set aside.

    It is decided once, by the driver, when it has connected to the cluster and before any rank starts; the driver's own
    machine does not matter. It holds for all restarts and resizings of these ranks (a run that is resumed later decides
    again), and it is one decision for all runs of a study, whose arms are compared:
    - cuda, if launch.resources_per_rank names GPU;
    - else cuda, if the nodes that are alive now, with all that they have, in use or not, can hold launch.num_processes
      ranks with a GPU each, as launch.placement wants them. Ranks up to launch.max_processes then wait for GPUs, too;
    - else cpu, on which ranks never see a GPU. Nodes that come later do not change that: Ray's autoscaler adds only
      what is asked for, so who waits for GPU nodes has to ask for them (launch.device=cuda).

    Raises:
        UsageError: if launch.device=cpu, and GPUs would be set aside for nobody.

    >>> auto, nodes = LaunchConfig(num_processes=2), [{"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    >>> [resolve_device([auto], nodes[:number])[0].device for number in (1, 2)]
    ['cpu', 'cuda']
    """
    for launch in launches:
        if launch.device == "cpu" and "GPU" in launch.resources_per_rank:
            raise UsageError(
                f"launch.resources_per_rank ({launch.resources_per_rank}) sets GPUs aside that ranks with "
                "launch.device=cpu do not use: leave GPU out, or choose launch.device=cuda"
            )
    undecided = [launch for launch in launches if launch.device == "auto" and "GPU" not in launch.resources_per_rank]
    short = [
        launch
        for launch in undecided
        if num_slots(nodes, resources_per_rank(_on("cuda", launch)), launch.placement) < launch.num_processes
    ]
    if short and any("GPU" in node for node in nodes):
        _warn(
            f"launch.device (auto) is cpu: launch.num_processes ({short[0].num_processes}) asks for more ranks with a "
            f"GPU than the Ray cluster has room for, {short[0].placement}: choose fewer ranks, or launch.device=cuda, "
            "which waits for more GPUs"
        )

    def device(launch: LaunchConfig) -> str:
        return launch.device if launch.device != "auto" else "cpu" if short and launch in undecided else "cuda"

    return [_on(device(launch), launch) for launch in launches]


def _on(device: str, launch: LaunchConfig) -> LaunchConfig:
    return launch.model_copy(update={"device": device})


def alive_nodes() -> list[dict[str, float]]:
    """What each node of the cluster has, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _warn(text: str) -> None:
    print(f"gengap: warning: {text}", file=sys.stderr, flush=True)


def check_address(address: str) -> bool:
    """Whether a Ray cluster answers at an address; False if the address is "auto" and this machine runs none.

    Another process tries: ray.init waits for a silent address for minutes, deaf to signals.

    Args:
        address: host:port, ray://host:port, or auto (the cluster that `ray start` has started on this machine).

    Raises:
        UsageError: if nothing answers within 15 s, or it refuses; the message says what to check.
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
    command = [sys.executable, "-c", _CONNECT, address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        said = said if "Unauthenticated" in said else f"no answer within {ANSWER_SECONDS:g} s"
    if process.returncode in (0, _NO_CLUSTER):
        return process.returncode == 0
    if "Unauthenticated" in said or "AuthenticationError" in said:
        said = "it wants another authentication token"
    reason = said.strip().splitlines()[-1][:200] if said.strip() else f"exit code {process.returncode}"
    raise UsageError(f"launch.ray_address ({address}) gives no Ray cluster ({reason}): {check}")


@final
class RayLauncher(Launcher):
    """Ranks that a Ray cluster starts where there is room for them; a study asks for its own (study/ray_tune.py)."""

    def run(self, config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
        """See `Launcher.run`; ranks always go on from the folder's checkpoint, as those started again must.

        Raises:
            UsageError: also if the cluster does not answer, or would throw the folder away.
            Preempted: if the ranks had to leave more often than launch.max_failures lets them start again.
        """
        check_folder(out)
        try:
            grows = not connect(config.launch)
            with sigterm_as_interrupt():
                teller, results = start_run_queue([(config, out)]), dict[int, Any]()
                (launch,) = resolve_device([config.launch], alive_nodes())
                team = WorkerGroup(uuid.uuid4().hex, config.launch, launch, teller, out / "ray", self.entry_point)
                told = lambda number, done, total, note: progress(done, total, note)  # noqa: E731
                WorkerGroupRun(team, told, results.__setitem__, config.launch.max_failures).wait(grows)
                return results[0]
        except RankFailed:
            raise  # the ranks are gone
        except BaseException:
            self.close(kill=True)
            raise
        finally:
            shutil.rmtree(out / "ray", ignore_errors=True)

    def close(self, *, kill: bool = False) -> None:
        """Leave the cluster, or end it if `run` has started it: Ray then kills all that this process asked for."""
        if "ray" in sys.modules:
            import ray

            ray.shutdown()


def check_folder(out: Path) -> None:
    """Refuse a folder that Ray throws away.

    Raises:
        UsageError: if it lies in a job's working directory.
    """
    if "runtime_resources" in out.parts:
        raise UsageError(
            f"--out ({out}) lies in Ray's copy of the job's working directory, which is deleted after the job: "
            "give an absolute --out that all nodes share"
        )


def connect(config: LaunchConfig) -> bool:
    """Connect to the cluster, or start one on this machine that ends with this process; whether it has done that."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "auto"
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():  # the runs of a study share one connection
            return False
    if address != "local" and JOB not in os.environ and not check_address(address):
        address = "local"
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before the import: Ray then keeps to loopback
    import ray

    # Of Ray's own processes; what ranks print and warn of reaches the driver's stderr.
    quiet: dict[str, Any] = {"logging_level": "ERROR", "logging_config": ray.LoggingConfig(log_level="ERROR")}
    if address != "local":
        ray.init(address=address, **quiet)
        return False
    needed = resources_per_rank(config)["CPU"] * (config.max_processes or config.num_processes)
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, int(-(-needed // 1))), include_dashboard=False, **quiet)
    return True


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that a stopped job still says how its run ended.

    `ray job stop` gives the driver and its children 3 s from SIGTERM to SIGKILL. Ray has a handler of its own: this one
    comes after ray.init.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RunQueue:
    """The actor between those who do the work and those who wait for it.

    It hands out runs, and keeps what is told until it is heard. Those who do runs one after another are a team; `team`
    is its name.
    """

    def __init__(self, runs: Sequence[tuple[RunConfig, Path]]) -> None:
        """Runs, each with its folder; they are known by their number."""
        self._runs = runs
        self._waiting = [*range(len(runs))]
        self._given: dict[str, tuple[int, int]] = {}  # by team: its run, and how often its ranks have begun with it
        self._news: dict[str, list[Message]] = {}

    def assign(self, team: str, launch: LaunchConfig) -> tuple[int, int] | None:
        """A team's run and how often it was begun: the one that it has, or else the next for ranks of its kind."""
        if team not in self._given:
            number = next((number for number in self._waiting if self._runs[number][0].launch == launch), None)
            if number is None:
                return None
            self._waiting.remove(number)
            self._given[team] = number, 0
        return self._given[team]

    def begin(self, team: str, launch: LaunchConfig) -> int:
        """The run that a team's ranks have to begin, or to go on with, now; -1 if none is left."""
        given = self.assign(team, launch)
        if given is None:
            return -1
        number, num_starts = given
        self._given[team] = number, num_starts + 1
        return number

    def end(self, team: str) -> None:
        """A team's run is over."""
        del self._given[team]

    def run(self, number: int) -> tuple[RunConfig, Path]:
        """A run and its folder."""
        return self._runs[number]

    def publish(self, about: str, kind: str, value: Any) -> None:
        """Keep this, for who waits for news about `about`."""
        self._news.setdefault(about, []).append((kind, value))

    def poll(self, about: str) -> list[Message]:
        """What was told since the last time."""
        return self._news.pop(about, [])


def start_run_queue(runs: Sequence[tuple[RunConfig, Path]]) -> Any:
    """An actor on this node that hands out these runs; their paths hold wherever ranks are."""
    import ray

    def resolved(config: RunConfig) -> RunConfig:
        return config.model_copy(update={"data": config.data.model_copy(update={"root": config.data.root.resolve()})})

    return ray.remote(RunQueue).options(**on_this_node()).remote([(resolved(config), out) for config, out in runs])


class WorkerGroup(NamedTuple):
    """Ranks of one kind that take runs from a teller until none is left for them."""

    name: str
    launch: LaunchConfig
    """As its runs have it; by this the teller knows which are for them."""
    resolved: LaunchConfig
    """The same with cpu or cuda for launch.device; see `resolve_device`."""
    queue: Any
    storage: Path
    """Folder for Ray Train's own files, which nobody needs afterwards."""
    entry_point: str
    """What every rank calls for a run, as `module:function`."""


class WorkerGroupRun:
    """One Ray Train run: a team, as it is seen from where it is waited for."""

    def __init__(
        self,
        team: WorkerGroup,
        progress: Callable[[int, int, int, str], None],
        over: Callable[[int, dict[str, Any]], None],
        max_failures: int,
    ) -> None:
        """Nothing starts before `wait`.

        Args:
            team: whose ranks Ray Train starts.
            progress: called with a run's number and its progress.
            over: called with a run's number and its result.
            max_failures: how often ranks may be started again.
        """
        import ray

        self.team, self.progress, self.over = team, progress, over
        self._task = ray.remote(_fit).options(max_retries=0, **on_this_node())
        self._job = {
            "team": team,
            "max_failures": max_failures,
            "num_threads": max(1, int(resources_per_rank(team.resolved)["CPU"])),
            "folder": Path.cwd(),
            "command": sys.orig_argv,
        }
        self._troubles: list[Message] = []  # of the ranks' latest start
        self._num_starts, self._size = 0, 0
        self._warned = 0.0

    def wait(self, grows: bool) -> None:
        """Until no run is left and the ranks are gone; `grows`: whether to wait for nodes that are not there yet.

        Raises:
            UsageError: what a rank found wrong with a run's config, or too few nodes that do not become more.
            RankFailed: if ranks failed and are not started again.
            Preempted: if ranks were asked to leave and are not started again.
        """
        import ray

        self._check_room(grows)
        fit = self._task.remote(self._job)
        while not ray.wait([fit], timeout=POLL_SECONDS)[0]:
            self._hear()
            if not self._size and time.monotonic() - self._warned > WAITING_SECONDS:
                self._warn("no rank has started yet: waiting for room in the Ray cluster (see `ray status`)")
        failure = ray.get(fit)
        self._hear()
        if failure:
            self._raise(*failure)

    def _hear(self) -> None:
        import ray

        for kind, value in ray.get(self.team.queue.hear.remote(self.team.name)):
            match kind:
                case "started":
                    self._started(value)
                case "progress":
                    self.progress(*value)
                case "usage":
                    raise UsageError(value)  # who waits ends the other ranks; none of them is to try again
                case "result":
                    self.over(*value)
                case _:
                    self._troubles.append((kind, value))
                    self._size, self._warned = 0, time.monotonic()

    def _started(self, size: int) -> None:
        self._num_starts += 1
        self._size = size
        if self._num_starts > 1:
            why = f" after: {_reason(self._troubles)}" if self._troubles else ""
            self._warn(f"{size} rank(s) started again, from the last checkpoint{why}")
        self._troubles.clear()

    def _raise(self, dead: dict[int, str], text: str) -> Never:
        """What has ended the last start of the ranks: a rank that was killed, else the first that raised something."""
        for rank, reason in dead.items():
            raise RankFailed(f"rank {rank} died: {reason}")
        for kind, value in self._troubles:
            if kind == "preempted":
                raise Preempted(value)
            raise RankFailed(f"rank {value[0]} failed:\n{value[1]}")
        raise RankFailed(f"Ray could not run the ranks: {text}")

    def _check_room(self, grows: bool) -> None:
        launch, nodes = self.team.resolved, alive_nodes()
        needs = resources_per_rank(launch)
        fit = num_slots(nodes, needs, launch.placement)
        self._warned = time.monotonic()
        if fit < launch.num_processes:
            text = (
                f"launch.num_processes ({launch.num_processes}) asks for more than the Ray cluster has: its "
                f"{len(nodes)} node(s) hold {fit} rank(s) of {needs}, {launch.placement}"
            )
            remedy = "choose fewer ranks or smaller launch.resources_per_rank"
            remedy += ", or launch.device=cpu" if launch.device == "cuda" else ""
            if not grows:
                raise UsageError(f"{text}: {remedy}")
            self._warn(f"{text}; waiting for it to grow: add nodes, or {remedy}")

    def _warn(self, text: str) -> None:
        self._warned = time.monotonic()
        _warn(text)


def _reason(troubles: list[Message]) -> str:
    """What came first, in a line; a traceback's last line may be any line of a long message."""
    kind, value = troubles[0]
    if kind == "preempted":
        return f"asked to leave at step {value}"
    lines = value[1].strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)), lines[-1])


def on_this_node() -> dict[str, Any]:
    """Options of a task or actor that runs on this node and takes nothing of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # not soft: Ray takes another node then, for what needs no CPU, and the run would die with that node
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": node}


def _fit(job: dict[str, Any]) -> tuple[dict[int, str], str] | None:
    """Ray Train, from start to end; what ended it before: ranks that were killed, and Ray's own words.

    A task on the driver's node. In the driver's main thread fit would take Ctrl-C for itself and exit with code 0, and
    a thread that still waits in Ray when the driver leaves the cluster ends the whole process.
    """
    try:
        _trainer(job).fit()
    except Exception as error:
        failures = sorted(getattr(error, "worker_failures", {}).items())
        lost = [(rank, why) for rank, why in failures if type(why).__name__ == "WorkerHealthCheckFailedError"]
        return {rank: " ".join(str(why).split()) for rank, why in lost}, str(error)


def _trainer(job: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch, on_gpu = job["team"].resolved, job["team"].resolved.device == "cuda"
    most = launch.max_processes or launch.num_processes
    return TorchTrainer(
        _rank,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=most if most == launch.num_processes else (launch.num_processes, most),
            use_gpu=on_gpu,
            resources_per_worker=resources_per_rank(launch),
            placement_strategy=launch.placement,
        ),
        run_config=RayRunConfig(
            name=uuid.uuid4().hex,  # Ray would take up the state of an earlier run of this name
            storage_path=str(job["team"].storage),
            failure_config=FailureConfig(max_failures=job["max_failures"]),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            # Some releases of Ray hide GPUs from ranks that have none, others do not, and then each makes the first GPU
            # its current one, which takes memory there.
            worker_runtime_env={} if on_gpu else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        ),
        # It cannot bind the group to a GPU (device_id). NCCL then connects at the first collective, on the current GPU,
        # which world.connect has set.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=launch.timeout_seconds),
    )


# -- on a rank --------------------------------------------------------------------------------------------------------


def _rank(job: dict[str, Any]) -> None:
    """A rank's life, in a thread of a Ray worker; the process group is there already."""
    import warnings

    import ray
    import torch

    from gengap_dist.distributed.process_group import init_process_group as join

    name, launch, resolved, teller, _, entry_point = job["team"]
    run = load_entry_point(entry_point)
    rank = int(os.environ["RANK"])
    if rank != 0:
        warnings.simplefilter("ignore")  # rank 0 says it for all
    if job["folder"].is_dir():
        os.chdir(job["folder"])  # the driver's, so that git and modules beside it are found; Ray's own is empty
    sys.orig_argv = job["command"]  # what the record shows
    torch.set_num_threads(job["num_threads"])  # what Ray has set aside; Ray itself says 1
    number, spoke = -1, 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal spoke
        if rank == 0 and (note or done == total or time.monotonic() - spoke > POLL_SECONDS):
            spoke = time.monotonic()
            teller.tell.remote(name, "progress", (number, done, total, note))

    def tell(kind: str, value: Any) -> None:
        ray.get(teller.tell.remote(name, kind, value))

    if rank == 0:
        tell("started", int(os.environ["WORLD_SIZE"]))
    try:
        world, leaving = join(resolved.device, resolved.timeout_seconds), _preemption_notice()
        while (number := world.broadcast_int(ray.get(teller.begin.remote(name, launch)) if rank == 0 else 0)) >= 0:
            config, out = ray.get(teller.run.remote(number))
            own = join(
                resolved.device, resolved.timeout_seconds
            )  # no new group, but a run's own account of where its time went
            result = run(
                config, out, resume=True, world=own, progress=progress, preemption_requested=leaving, launcher="ray"
            )
            if rank == 0:
                tell("result", (number, result))
                ray.get(teller.end.remote(name))
    except OutOfMemory as error:
        if not error.reported_elsewhere:
            tell("usage", str(error))
    except UsageError as error:
        tell("usage", str(error))  # and no exception: Ray would start the ranks again
    except Preempted as error:
        tell("preempted", error.step)
        raise RuntimeError(str(error)) from None  # Ray starts the ranks again, on the nodes that stay
    except Exception:
        tell("failed", (rank, traceback.format_exc()))
        raise RuntimeError(f"rank {rank} failed") from None  # an exception of ours need not survive pickling


def _preemption_notice() -> PreemptionFlag:
    """A notice that is given when Ray is about to take a node away.

    Asking Ray makes all ranks wait for each other, so a thread on every rank asks, and steps only look at the notice.
    """
    import ray.train

    notice = PreemptionFlag()

    def ask() -> None:
        while ray.train.get_preemption_info() is None:
            time.sleep(PREEMPTION_SECONDS)
        notice.set(0)

    threading.Thread(target=ask, daemon=True).start()
    return notice
