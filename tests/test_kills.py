"""Ranks and uploaders are killed at random moments, during saves too; the run ends as if nothing had happened.

`make test` kills ranks of torchrun once, `make test-full` those of torchrun and Ray five times; as often as one likes:
`GENGAP_FULL=1 GENGAP_KILLS=20 pytest tests/test_kills.py`.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import read_info, read_metrics
from tests.conftest import FULL, weights
from tests.ranks import start_module
from tests.ray_cluster import Cluster
from tests.tracking.servers import uploaders_of

NUM_KILLS = int(os.environ.get("GENGAP_KILLS", "5" if FULL else "1"))
NUM_STEPS = 100 * NUM_KILLS
SETTINGS = {
    "--train.steps": NUM_STEPS, "--batch.global_size": 100, "--train.num_evals": 3, "--probe.per_decade": 1,
    "--probe.num_samples": 64, "--checkpoint.every_steps": 3,
}  # fmt: skip
WORDS = [str(word) for pair in SETTINGS.items() for word in pair]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("default")]  # what MLflow warns of is not ours to mend


def kill_now_and_then(
    agent: psutil.Process, find: Callable[[], list[psutil.Process]], out: Path, num_kills: int, seed: int
) -> Counter[str]:
    """SIGKILL one of the ranks that `find` finds `num_kills` times, a random time after training went on; by moment.

    Every other time the uploader is killed, too.

    `agent` is the process that starts them again.
    """
    luck = random.Random(seed)
    moments: Counter[str] = Counter()
    last = -1
    while moments.total() < num_kills:
        while max(checkpoint.checkpoints_by_step(out / "checkpoints"), default=-1) <= last:  # nothing new
            assert agent.status() != psutil.STATUS_ZOMBIE, "it ended before the last kill"
            time.sleep(0.005)
        if luck.random() < 0.5:
            time.sleep(luck.random())
        else:
            while not list(out.glob("checkpoints/.*.part")) and agent.status() != psutil.STATUS_ZOMBIE:
                pass  # a save is to begin
            time.sleep(luck.random() * 0.01)
        saving = bool(list(out.glob("checkpoints/.*.part")))
        last = max(checkpoint.checkpoints_by_step(out / "checkpoints"))
        if ranks := find():
            luck.choice(ranks).kill()
            for uploader in uploaders_of(out)[luck.randrange(2) :]:
                uploader.kill()
            moments["during a save" if saving else "between saves"] += 1
            psutil.wait_procs(ranks, timeout=60)
    return moments


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


def test_torchrun_ranks_killed_at_random_moments(whole, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    killed = tmp_path / "killed"
    command = [*TORCHRUN, "--max-restarts", str(NUM_KILLS), "-m", "gengap_dist.train", *WORDS, "--out", str(killed)]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        launcher = psutil.Process(agent.pid)
        moments = kill_now_and_then(launcher, launcher.children, killed, NUM_KILLS, seed=0)
        assert agent.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"killed {dict(moments)}")
    check_uninterrupted(killed, whole, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert 1 <= len(read_info(killed).resumed) <= NUM_KILLS  # one may be killed again before it says so


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
def test_ray_ranks_killed_at_random_moments(cluster, whole, tmp_path):
    killed = tmp_path / "killed"
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    on_ray = [*WORDS, "--launch.launcher", "ray", "--launch.num_processes", "2"]
    env = cluster.env | {"RAY_ADDRESS": cluster.address, "MLFLOW_TRACKING_URI": store}
    command = [sys.executable, "-m", "gengap_dist.train", *on_ray, "--launch.max_failures", str(NUM_KILLS)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen([*command, "--out", str(killed)], env=env, stdout=log, stderr=log, cwd=tmp_path)
        moments = kill_now_and_then(psutil.Process(driver.pid), lambda: workers_of(cluster), killed, NUM_KILLS, seed=1)
        assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"killed {dict(moments)}")
    check_uninterrupted(killed, whole, store)


def workers_of(cluster: Cluster) -> list[psutil.Process]:
    """The processes in which this cluster's ranks live."""
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    return [process for process in family if process.name().startswith("ray::") and "RayTrainWorker" in title(process)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it went meanwhile
        return ""
