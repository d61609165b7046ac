"""launch.timeout_seconds holds for every process group of a rank, whichever strategy has made it.

123 s is no default: torch's are 10 minutes (NCCL) and 30 (gloo), ours is 10.
"""

import os
import subprocess
import sys
from datetime import timedelta

import pytest

from gengap_dist.config import LaunchConfig, validate
from tests import fake_cuda
from tests.ranks import Crew, standing
from tests.strategies import jobs
from tests.strategies.test_contract import NEEDS, SHARED

LIMIT = timedelta(seconds=123)
SETTINGS = {"model__name": "mlp", "launch__timeout_seconds": 123}
ON_GPUS = """
import sys
from tests.ranks import standing
from tests.strategies.test_timeouts import SETTINGS, crew_on
from tests.strategies import jobs

device, *names = sys.argv[1:]
with standing(crew_on(device), (1, 2)) as crews:
    for size, crew in crews.items():
        for name in names if size == 2 else [name for name in names if name != "ddp"]:
            for found in crew(jobs.timeouts, name, SETTINGS):
                print(f"{device} {size} {name}", *(f"{key}={limit}" for key, limit in found.items()), sep="|")
"""


def crew_on(device: str):
    launch = validate(LaunchConfig, {"device": device, "timeout_seconds": 123})
    return lambda size: Crew(size, launch)


@pytest.fixture(scope="module")
def crews():
    with standing(crew_on("cpu"), (1, 2)) as crews:
        yield crews


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SHARED)
def test_every_group_waits_as_long_as_the_config_says(crews, name, size):
    if (name, size) == ("ddp", 1):
        pytest.skip("ddp on one rank is single, which has no process group")
    for found in crews[size](jobs.timeouts, name, SETTINGS):
        assert found
        assert set(found.values()) == {LIMIT}, found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_machine_with_gpus_too(device):
    """There torch makes other groups, also for ranks on a CPU; fake GPUs, because they are all that torch looks at."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    names = ["ddp", "fsdp", *(["zero2"] if not NEEDS.args[0] else [])]  # each that makes groups of its own
    command = [sys.executable, "-c", ON_GPUS, device, *names]
    env = fake_cuda.environment(2, mib=2000)
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(names) - 1  # two ranks, and one alone without ddp
    for line in lines:
        who, *groups = line.split("|")
        assert groups, who
        assert {group.split("=")[1] for group in groups} == {str(LIMIT)}, line
        assert any(" nccl=" in group for group in groups) == (device == "cuda"), line
