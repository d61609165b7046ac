"""What launch/ starts, started: real ranks of torchrun and of DeepSpeed's launcher on this machine."""

import os
import subprocess
import sys
import time

import pytest

from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.runs.run_folder import read_info, read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.processes

SMALL = ["--train.steps", "6", "--launch.device", "cpu", "--probe.enabled", "false", "--mlflow.enabled", "false"]


RANK = """
import os, pathlib, signal, time
rank = os.environ["RANK"]
def told(*_):
    pathlib.Path("told." + rank).touch()
    raise SystemExit(75)
signal.signal(signal.SIGTERM, told)
pid = pathlib.Path("writing." + rank)
pid.write_text(str(os.getpid()))
pid.rename("pid." + rank)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("script", "env"),
    [
        ("torchrun/multi_node.sh", {"NPROC_PER_NODE": "2"}),
        ("deepspeed/run.sh", {"NUM_PROCESSES": "2", "STRATEGY": "ddp", "DEVICE": "cpu"}),
    ],
)
def test_two_ranks_train(tmp_path, script, env):
    env |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = ["bash", ROOT / "launch" / script, ROOT / "configs" / "demo_train.yaml", tmp_path / "run", *SMALL]
    done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "run")
    assert (info.status, info.world_size) == ("finished", 2)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == [*range(1, 7)]
    assert str(tmp_path / "run") in done.stdout


# DeepSpeed's launcher is slow to start; it is in the test above
@pytest.mark.parametrize("script", ["torchrun/multi_node.sh", pytest.param("deepspeed/run.sh", marks=pytest.mark.full)])
def test_every_rank_is_told_to_leave(tmp_path, script):
    """SIGTERM at the script reaches each rank, and nothing of the run is left."""
    (tmp_path / "gengap_dist").mkdir()
    (tmp_path / "gengap_dist" / "__init__.py").touch()
    (tmp_path / "gengap_dist" / "train.py").write_text(RANK)
    env = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "MASTER_PORT": str(free_port()), "DEVICE": "cpu"}
    env |= {"NUM_PROCESSES": "2", "NPROC_PER_NODE": "2"}
    job = subprocess.Popen(["bash", ROOT / "launch" / script, "x", "y"], env=os.environ | env, cwd=tmp_path)
    for _ in range(1200):
        if len(started := [*tmp_path.glob("pid.*")]) == 2:
            break
        time.sleep(0.05)
    job.terminate()
    assert job.wait(60) != 0
    assert sorted(path.name for path in tmp_path.glob("told.*")) == ["told.0", "told.1"]
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
