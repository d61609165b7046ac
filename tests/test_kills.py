"""Ranks, their agent, the driver, the uploader and Ray's raylet are killed at random moments, during saves too.

Nothing shows it in the end. `make test` kills three processes of a run under torchrun, `make test-full` twenty, and six
of a run on Ray; as often as one likes: `GENGAP_FULL=1 GENGAP_KILLS=100 pytest tests/test_kills.py`.
"""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import read_info, read_metrics
from tests.conftest import FULL, weights
from tests.ranks import start_module
from tests.ray_cluster import Cluster, until

NUM_KILLS = int(os.environ.get("GENGAP_KILLS", "20" if FULL else "3"))
NUM_RAY_KILLS = 6
NUM_STEPS = 100 * NUM_KILLS
VICTIMS = ("agent", "driver", "uploader", "rank")
RAY_VICTIMS = ("rank", "driver", "raylet")
SETTINGS = {
    "--train.steps": NUM_STEPS, "--batch.global_size": 100, "--train.num_evals": 3, "--probe.per_decade": 1,
    "--probe.num_samples": 64, "--checkpoint.every_steps": 3,
}  # fmt: skip
WORDS = [str(word) for pair in SETTINGS.items() for word in pair]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("default")]  # what MLflow warns of is not ours to mend


def wait_for_a_moment(agent: psutil.Process, out: Path, last: int, luck: random.Random) -> str:
    """Wait a random time after training went on beyond the checkpoint of step `last`; which moment it is."""
    while max(checkpoint.checkpoints_by_step(out / "checkpoints"), default=-1) <= last:
        assert agent.status() != psutil.STATUS_ZOMBIE, "it ended before the last kill"
        time.sleep(0.005)
    if luck.random() < 0.5:
        time.sleep(luck.random())
    else:
        while not list(out.glob("checkpoints/.*.part")) and agent.status() != psutil.STATUS_ZOMBIE:
            pass  # a save is to begin
        time.sleep(luck.random() * 0.01)
    return "during a save" if list(out.glob("checkpoints/.*.part")) else "between saves"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """On a disk, where saves take a while."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of two ranks that nobody kills."""
    out = tmp_path_factory.mktemp("whole") / "run"
    words = [*WORDS, "--mlflow.enabled", "false", "--launch.num_processes", "2", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start_module("gengap_dist.train", *words, cwd=out.parent, env=env).check_returncode()
    return out


def test_anyone_killed_at_random_moments(whole, tmp_path):
    """Under torchrun, where rank 0 is the driver. What its agent leaves behind ends by itself."""
    store, killed = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "killed"
    env = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": store}
    command = [*TORCHRUN, "--max-restarts", str(NUM_KILLS), "-m", "gengap_dist.train", *WORDS, "--resume"]
    luck, moments, last, starts = random.Random(0), Counter[tuple[str, str]](), -1, 0
    with (tmp_path / "log").open("w") as log:
        agent, victim = psutil.Popen([*command, "--out", str(killed)], env=env, stdout=log, stderr=log), ""
        for number in range(NUM_KILLS):
            others = [name for name in VICTIMS if not (name == victim == "uploader")]  # a start makes the next uploader
            victim = VICTIMS[number] if number < len(VICTIMS) else luck.choice(others)
            moment, ranks, found = "", list[psutil.Process](), list[psutil.Process]()
            while not found:  # they may be starting
                assert agent.status() != psutil.STATUS_ZOMBIE, "it ended before the last kill"
                moment = wait_for_a_moment(agent, killed, last, luck)
                ranks = sorted(agent.children(), key=lambda process: process.environ().get("RANK", ""))
                found = {"agent": [agent], "driver": ranks[:1], "rank": ranks[1:], "uploader": uploaders(killed)}[
                    victim
                ]
            last = max(checkpoint.checkpoints_by_step(killed / "checkpoints"))
            found[0].kill()
            moments[victim, moment] += 1
            if victim != "uploader":
                starts += 1
                assert not psutil.wait_procs(ranks, timeout=60 if victim != "agent" else 10)[1]
            if victim == "agent":
                agent.wait()
                until(lambda: not uploaders(killed))
                agent = psutil.Popen([*command, "--out", str(killed)], env=env, stdout=log, stderr=log)
        assert agent.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"killed {dict(moments)}")
    start_module("gengap_dist", "report", "sync", str(killed), cwd=tmp_path, env=env).check_returncode()
    check_uninterrupted(killed, whole, store)
    assert 1 <= len(read_info(killed).resumed) <= starts  # one may be killed again before it says so


def uploaders(out: Path) -> list[psutil.Process]:
    """The processes that send this run to MLflow; they have left the family of the command."""
    words = f"gengap_dist.tracking.mlflow.process {out} "
    return [process for process in psutil.process_iter() if words in title(process)]


def check_uninterrupted(killed: Path, whole: Path, uri: str) -> None:
    """Bitwise the same weights; every step once in the record and in one MLflow run."""
    assert read_info(killed).status == "finished"
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(killed)[name]), name
    losses = [(line["step"], line.get("train/loss")) for line in read_metrics(killed)]
    assert losses == [(line["step"], line.get("train/loss")) for line in read_metrics(whole)]
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("gengap_dist").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == losses[1:]


@pytest.mark.full  # else: a rank of Ray killed once, in mid-run, in distributed/launchers/test_ray.py
def test_anyone_of_ray_killed_at_random_moments(whole, tmp_path):
    """A rank, which Ray starts again; the command; and the raylet, with which the whole cluster ends."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    killed, store = tmp_path / "killed", f"sqlite:///{tmp_path / 'mlflow.db'}"
    on_ray = [*WORDS, "--launch.launcher", "ray", "--launch.num_processes", "2", "--resume"]
    command = [sys.executable, "-m", "gengap_dist.train", *on_ray, "--launch.max_failures", str(NUM_RAY_KILLS)]
    luck, moments, last = random.Random(1), Counter[tuple[str, str]](), -1
    with ExitStack() as stack, (tmp_path / "log").open("w") as log:

        def new_cluster() -> Cluster:
            # a path for sockets may hold 107 characters: pytest's own folders are too deep
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True))
            cluster = Cluster(Path(folder))
            stack.callback(cluster.close)
            return cluster

        def new_driver(cluster: Cluster) -> psutil.Popen:
            env = cluster.env | {"RAY_ADDRESS": cluster.address, "MLFLOW_TRACKING_URI": store}
            return psutil.Popen([*command, "--out", str(killed)], env=env, stdout=log, stderr=log, cwd=tmp_path)

        cluster = new_cluster()
        driver = new_driver(cluster)
        for number in range(NUM_RAY_KILLS):
            victim = RAY_VICTIMS[number % len(RAY_VICTIMS)]
            moment, ranks = "", list[psutil.Process]()
            while not ranks:  # they may be starting
                moment = wait_for_a_moment(driver, killed, last, luck)
                ranks = workers_of(cluster)
            last = max(checkpoint.checkpoints_by_step(killed / "checkpoints"))
            found = {"rank": luck.choice(ranks), "driver": driver, "raylet": raylet_of(cluster)}[victim]
            found.kill()
            moments[victim, moment] += 1
            assert not psutil.wait_procs(ranks, timeout=60)[1], f"ranks outlive their {victim}"
            if victim == "rank":
                continue
            if victim == "raylet":
                assert driver.wait(timeout=120) != 0
                cluster.close()
                cluster = new_cluster()
            driver.wait()
            driver = new_driver(cluster)
        assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"killed {dict(moments)}")
    check_uninterrupted(killed, whole, store)


def workers_of(cluster: Cluster) -> list[psutil.Process]:
    """The processes in which this cluster's ranks live."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    return [process for process in family if process.name().startswith("ray::") and "RayTrainWorker" in title(process)]


def raylet_of(cluster: Cluster) -> psutil.Process:
    """The process that starts this cluster's workers."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    (raylet,) = [process for process in family if process.name() == "raylet"]
    return raylet


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it went meanwhile
        return ""
