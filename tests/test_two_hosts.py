"""Two hosts: network namespaces joined by a veth pair. A node dies or the cable is cut, and no result changes."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gengap_dist.runs.run_folder import read_info, read_metrics
from tests.conftest import ROOT, weights
from tests.ranks import start_module

pytestmark = pytest.mark.processes

NAMES = (f"gengap{os.getpid()}.{number}" for number in itertools.count())
STEPS, GATE = 40, 20
WORDS = [
    *("--data.name", "digits", "--model.name", "factory:make", "--train.steps", STEPS, "--train.dtype", "float64"),
    *("--train.num_evals", 4, "--checkpoint.every_steps", 4, "--mlflow.enabled", "false", "--probe.enabled", "false"),
    *("--launch.device", "cpu"),
]
# A LeNet-5 that waits in its GATE-th pass in training mode on two ranks while there is a file `wait`: in step GATE - 1,
# because one pass is made before the first step, to see which parameters are used.
FACTORY = f"""
import os, time
from pathlib import Path
from gengap_dist.models import lenet5

here = Path(__file__).parent

def make(num_classes, in_channels):
    model, num_steps = lenet5(num_classes=num_classes, in_channels=in_channels), 0
    def hook(module, args):
        nonlocal num_steps
        num_steps += module.training
        if num_steps == {GATE} and os.environ.get("WORLD_SIZE") == "2" and (here / "wait").exists():
            (here / f"at_gate.{{os.environ['RANK']}}").touch()
            while (here / "wait").exists():
                time.sleep(0.05)
    model.register_forward_pre_hook(hook)
    return model
"""


def ip(*words: object) -> str:
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Process(subprocess.Popen):
    """A process that writes to a file, in the folder where it works."""

    def __init__(self, command: list[str], log: Path, **kwargs) -> None:
        super().__init__(command, cwd=log.parent, **kwargs)
        self.log = log

    def said(self) -> str:
        return self.log.read_text()

    def has_said(self, words: str) -> Callable[[], bool]:
        return lambda: words in self.said()


class Host:
    """A network namespace: `start` runs a command in it, `kill` ends all that runs there."""

    def __init__(self, address: str) -> None:
        self.name, self.address = next(NAMES), address
        self.processes: list[Process] = []
        ip("netns", "add", self.name)

    def start(self, *words: object, log: Path, **env: str) -> "Process":
        command = ["ip", "netns", "exec", self.name, *map(str, words)]
        known = {"PYTHONPATH": f"{ROOT}:{log.parent}", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            self.processes.append(Process(command, log, env=os.environ | known | env, stdout=file, stderr=file))
        return self.processes[-1]

    def set_up(self) -> None:
        ip("-n", self.name, "address", "add", f"{self.address}/30", "dev", "eth0")
        ip("-n", self.name, "link", "set", "lo", "up")
        self.link("up")
        # a socket to a host that is gone gives up after 13 s, not after 15 minutes
        ip("netns", "exec", self.name, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")

    def link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "eth0", state)

    def kill(self) -> None:
        """SIGKILL to every process here, and to those they start meanwhile."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            for process in self.processes:
                process.poll()
            time.sleep(0.05)
        for process in self.processes:
            process.wait()

    def remove(self) -> None:
        self.kill()
        ip("netns", "del", self.name)


@pytest.fixture
def hosts():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("two hosts need root and iproute2's ip, to make network namespaces")
    with contextlib.ExitStack() as stack:
        try:
            pair = []
            for address in ("10.203.0.1", "10.203.0.2"):
                pair.append(Host(address))
                stack.callback(pair[-1].remove)
            ip("link", "add", "eth0", "netns", pair[0].name, "type", "veth", "peer", "eth0", "netns", pair[1].name)
            for host in pair:
                host.set_up()
        except OSError as error:
            pytest.skip(f"this machine gives no network namespaces: {error}")
        yield pair


def until(holds, *processes: "Process", seconds: float = 240.0) -> None:
    """Wait; the processes must not end before."""
    end = time.monotonic() + seconds
    while not holds():
        said = "\n".join(process.said() for process in processes)
        assert all(process.poll() is None for process in processes) or holds(), said
        assert time.monotonic() < end, f"it never came\n{said}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "factory.py").write_text(FACTORY)
    done = start_module("gengap_dist.train", *WORDS, "--out", "run", cwd=folder, env=os.environ)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def gate(tmp_path):
    """A folder whose factory's network waits in mid-run until the file `wait` is gone."""
    (tmp_path / "factory.py").write_text(FACTORY)
    (tmp_path / "wait").touch()
    return tmp_path


def torchrun(
    hosts: list[Host], folder: Path, *words: object, nnodes: str, max_restarts: int = 3, again: str = ""
) -> list:
    """One agent on each host, with one rank; the first host keeps the rendezvous."""
    agents = []
    for number, host in enumerate(hosts):
        head = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}", "--nproc_per_node=1"]
        head += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:29400", "--local-addr", host.address]
        # after the last call the first agent starts alone, and one that comes then may wait for it in vain
        conf = f"is_host={int(number == 0)},last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=5"
        head += ["--rdzv-conf", conf, "--rdzv-id=two-hosts", f"--max-restarts={max_restarts}"]
        log = folder / f"host{number}{again}.log"
        agents.append(host.start(*head, "-m", "gengap_dist.train", *WORDS, *words, "--out", folder / "run", log=log))
    return agents


def check_same(run: Path, whole: Path) -> None:
    assert read_info(run).status == "finished"
    lines, expected = [*read_metrics(run)], [*read_metrics(whole)]
    assert [line["step"] for line in lines] == [*range(STEPS + 1)]
    losses, others = ([line["train/loss"] for line in found[1:]] for found in (lines, expected))
    assert losses == pytest.approx(others, rel=1e-9)
    found = weights(run)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9, msg=name)


def test_a_node_is_killed_and_the_other_goes_on_alone(hosts, gate, whole):
    agents = torchrun(hosts, gate, nnodes="1:2")
    until(lambda: len([*gate.glob("at_gate.*")]) == 2, *agents)
    hosts[1].kill()
    (gate / "wait").unlink()
    assert agents[0].wait(240) == 0, agents[0].said()
    info = read_info(gate / "run")
    assert (info.world_size, len(info.resumed)) == (1, 1)
    check_same(gate / "run", whole)


@pytest.mark.full  # else: what is said in distributed/test_stall_detector.py; a start after a failure below and above
def test_the_link_is_cut_and_the_run_is_started_again(hosts, gate, whole):
    limits = [
        "--launch.timeout_seconds",
        12,
        "--launch.stall_report_seconds",
        6,
    ]  # at 4 the far word is on the edge of silence
    agents = torchrun(hosts, gate, *limits, nnodes="2", max_restarts=0)
    until(lambda: len([*gate.glob("at_gate.*")]) == 2, *agents)
    hosts[1].link("down")
    (gate / "wait").unlink()
    for agent in agents:
        assert agent.wait(240) == 1, agent.said()
    said = agents[0].said()
    waits = rf"rank 0 waits in sum of gradients \(step {GATE - 1}\) for rank 1 \(.*, process \d+\), which sent"
    assert re.search(waits, said)
    assert "gengap train, rank 1: RuntimeError: " in agents[1].said()
    assert read_info(gate / "run").status == "failed"
    hosts[1].link("up")
    for agent in torchrun(hosts, gate, *limits, "--resume", nnodes="2", again=".again"):
        assert agent.wait(240) == 0, agent.said()
    check_same(gate / "run", whole)


RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # wait less for a node that Ray does not know to be gone (60)
    "RAY_health_check_period_ms": "1000",  # give a node up after about 5 s (15)
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}


@pytest.fixture
def ray_nodes(hosts):
    """A Ray cluster with one node on each host; its address."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    address = f"{hosts[0].address}:6379"
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # pytest's own are too deep for the names of sockets
        for number, host in enumerate(hosts):
            words = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
            words = [f"--address={address}"] if number else words
            words += [f"--node-ip-address={host.address}", "--num-cpus=1", "--num-gpus=0", "--block"]
            command = [Path(sys.executable).parent / "ray", "start", *words, "--object-store-memory=100000000"]
            node = host.start(*command, log=Path(folder) / f"node{number}.log", **RAY)
            until(node.has_said("Ray runtime started"), node)
        yield address
        for host in hosts:
            host.kill()


@pytest.mark.full  # else: a node of torchrun that dies, above; a rank of Ray that dies, in launchers/test_ray.py
def test_a_node_of_a_ray_cluster_dies(hosts, ray_nodes, gate, whole):
    words = ["--launch.launcher", "ray", "--launch.max_processes", 2, "--launch.placement", "SPREAD"]
    words += ["--launch.ray_address", ray_nodes, "--launch.timeout_seconds", 30, "--out", gate / "run"]
    command = [sys.executable, "-m", "gengap_dist.train", *WORDS, *words]
    driver = hosts[0].start(*command, log=gate / "driver.log", **RAY)
    until(lambda: len([*gate.glob("at_gate.*")]) == 2, driver)
    hosts[1].kill()
    (gate / "wait").unlink()
    assert driver.wait(400) == 0, driver.said()
    assert re.search(r"1 rank\(s\) restarted from the last checkpoint after: \w+Error: ", driver.said())
    assert read_info(gate / "run").world_size == 1
    check_same(gate / "run", whole)
