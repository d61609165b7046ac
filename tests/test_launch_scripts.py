"""What launch/ starts, started: real ranks of torchrun and of DeepSpeed's launcher on this machine."""

import os
import subprocess
import sys

import pytest

from gengap_dist.launchers.local import free_port
from gengap_dist.tracking.record import read_info, read_metrics
from tests.conftest import ROOT

SMALL = ["--train.steps", "6", "--launch.device", "cpu", "--probe.enabled", "false", "--mlflow.enabled", "false"]


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
    assert (info["status"], info["world_size"]) == ("finished", 2)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == [*range(1, 7)]
    assert str(tmp_path / "run") in done.stdout
