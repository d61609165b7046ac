"""launch.timeout_seconds holds for every process group of a rank, whichever strategy has made it.

123 s is no default: torch's are 10 minutes (NCCL) and 30 (gloo), ours is 10.
"""

from datetime import timedelta

import pytest

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.worker_pool import environment_variables as environment
from tests import fake_cuda
from tests.conftest import FULL
from tests.parallel.strategies import jobs
from tests.parallel.strategies.test_contract import NEEDS, SHARED
from tests.ranks import Crew, standing

pytestmark = pytest.mark.processes

LIMIT = timedelta(seconds=123)
SETTINGS = {"model__name": "mlp", "launch__timeout_seconds": 123}


def crew_on(device: str):
    launch = validate(LaunchConfig, {"device": device, "timeout_seconds": 123})
    return lambda size: Crew(size, launch)


@pytest.fixture(scope="module")
def crews():
    with standing(crew_on("cpu"), (1, 2) if FULL else (2,)) as crews:
        yield crews


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("name", SHARED)
def test_every_group_waits_as_long_as_the_config_says(crews, name, size):
    if (name, size) == ("ddp", 1):
        pytest.skip("ddp on one rank is single, which has no process group")
    for found in crews[size](jobs.timeouts, name, SETTINGS):
        assert found
        assert set(found.values()) == {LIMIT}, found


def test_groups_of_hybrid_sharding_do_too(crews):
    for found in crews[2](jobs.timeouts, "fsdp", SETTINGS | {"launch__shard_size": 1}):
        assert {"default_pg gloo", "replicate gloo", "shard gloo"} <= set(found)  # and those of tests before
        assert set(found.values()) == {LIMIT}, found


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.full), "cuda"])
def test_on_a_machine_with_gpus_too(device):
    """There torch makes other groups, also for ranks on a CPU; fake GPUs, because they are all that torch looks at."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    names = ["ddp", "fsdp", *(["zero2"] if not NEEDS.args[0] else [])]  # each that makes groups of its own
    with environment(fake_cuda.environment(2)), standing(crew_on(device), (1, 2) if FULL else (2,)) as crews:
        for size, crew in crews.items():
            for name in names if size == 2 else names[1:]:
                for found in crew(jobs.timeouts, name, SETTINGS):
                    assert set(found.values()) == {LIMIT}, (name, size, found)
                    assert any(key.endswith(" nccl") for key in found) == (device == "cuda"), (name, size, found)
