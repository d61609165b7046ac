"""Metrics of GPUs, asked for as the driver answers: a library of its name with three GPUs, compiled here."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("gcc") is None, reason="needs Linux and gcc"
)

SAMPLE = """
import sys, pathlib
from gengap_dist.runs.system_metrics import sampling

assert "pynvml" not in sys.modules
with sampling(pathlib.Path(sys.argv[1]), 0.01, num_nodes=1):
    pass
assert "torch" not in sys.modules
"""
pytestmark = pytest.mark.processes

FIRST = {"gpu_0_utilization_percentage": 90, "gpu_0_power_usage_watts": 350.5}
MIB_OF_GPU = {"memory_usage_megabytes": 20_000.0, "memory_usage_percentage": 25.0}


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The folder of the library."""
    folder = tmp_path_factory.mktemp("driver")
    source, library = ROOT / "tests/fake_cuda/nvml.c", folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return folder


def sampled(out: Path, driver: Path | None, visible: str | None) -> dict[str, float]:
    """The GPUs' part of a sample that a process takes."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"LD_LIBRARY_PATH": str(driver)} if driver else {}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", SAMPLE, out], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    line = json.loads((out / "system.jsonl").read_text().splitlines()[-1])
    assert line["system_memory_usage_megabytes"] > 0
    return {name: value for name, value in line.items() if name.startswith("gpu_")}


def test_what_a_gpu_tells(driver, tmp_path):
    found = sampled(tmp_path, driver, None)
    assert {name: found[name] for name in FIRST} == FIRST
    for index in range(3):
        assert {name: found[f"gpu_{index}_{name}"] for name in MIB_OF_GPU} == MIB_OF_GPU
    assert "gpu_1_power_usage_watts" not in found  # it does not know
    assert found["gpu_1_utilization_percentage"] == 91
    assert len(found) == 11


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("2", "2"),
        ("1,0", "01"),
        (" 1 , 2 ", "12"),
        ("0,7,1", "0"),
        ("1,-1,0", "1"),
        ("0,x", "0"),
        ("1,1", ""),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("GPU-77000000-0000-0000-0000-000000000000,GPU-5a", "02"),
        ("GPU-5b,GPU-5,GPU-77", "1"),  # the second is true of two
        ("GPU-5b,0", "1"),
        ("0,GPU-5b", "0"),
    ],
)
def test_gpus_that_a_process_may_not_see_are_left_out(driver, tmp_path, visible, indices):
    assert {name.split("_")[1] for name in sampled(tmp_path, driver, visible)} == set(indices)


def test_an_instance_of_a_gpu(driver, tmp_path):
    """Has memory of its own; how busy it is, and its power, nobody knows."""
    known = "MIG-e1000000-0000-0000-0000-000000000000"
    wanted = {"gpu_2_memory_usage_megabytes": 2_500.0, "gpu_2_memory_usage_percentage": 25.0}
    assert sampled(tmp_path, driver, known) == wanted
    assert sampled(tmp_path, driver, f"MIG-ff,{known}") == {}


def test_a_machine_without_a_driver(tmp_path):
    assert sampled(tmp_path, None, None) == {}
