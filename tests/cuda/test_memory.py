"""What happens where a GPU's memory ends: on a fake GPU of few MiB."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from gengap_dist.config import LaunchConfig, UsageError
from gengap_dist.launchers.local import _environment
from gengap_dist.tracking.record import prepare_folder, read_info
from gengap_dist.world import World
from tests import fake_cuda
from tests.conftest import config
from tests.cuda.scenarios import BASE, OFF, Settings
from tests.cuda.test_scenarios import numbers
from tests.ranks import Crew

pytestmark = pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))

MIB = 200


@pytest.fixture(scope="module")
def gpu() -> Iterator[Crew]:
    """One rank with a fake GPU of 200 MiB."""
    with _environment(fake_cuda.environment(1, mib=MIB)), closing(Crew(1, LaunchConfig(device="cuda"))) as crew:
        yield crew


def trained(world: World, settings: Settings, out: Path) -> str:
    """A run; what it was refused for, or nothing."""
    from gengap_dist.run import run

    prepare_folder(out, "run.json", resume=False)
    try:
        run(config(**settings), out, world=world)
    except UsageError as error:
        return str(error)
    return ""


def curvature(world: World) -> tuple[list[float], int]:
    """Hessian eigenvalues of 250,000 parameters, and the most MiB that it took of the GPU."""
    from gengap_dist.probes.sharpness import hessian_eigenvalues

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 3)).to(world.device)
    batches = [(torch.randn(40, 500, device=world.device), torch.arange(40, device=world.device) % 3)]
    torch.cuda.reset_peak_memory_stats()
    found = hessian_eigenvalues(model, batches, world=world, num=2, tolerance=1e-9, max_steps=120)
    return found, torch.cuda.max_memory_allocated() >> 20


def test_lanczos_keeps_its_basis_out_of_the_gpu(gpu):
    """120 vectors of 252,003 float64 are 231 MiB, more than the GPU has."""
    ((found, most),) = gpu(curvature)
    assert len(found) == 2
    assert found[0] > found[1]
    assert most < 80


def test_images_that_do_not_fit_are_kept_on_the_host(gpu, tmp_path):
    """1,797 digits of 256 x 256 are 112 MiB: more than half of what is free."""
    settings = (
        BASE | OFF | {"data__image_size": 256, "train__steps": 2, "data__augment": ("flip",), "launch__device": "cuda"}
    )
    settings |= {"model__name": f"{__name__}:coarse"}
    assert gpu(trained, settings, tmp_path / "auto") == [""]
    assert gpu(trained, settings | {"data__device": "cpu"}, tmp_path / "cpu") == [""]
    assert numbers(tmp_path / "auto") == numbers(tmp_path / "cpu")


def test_images_that_are_to_fit_and_do_not_are_refused_before_they_are_copied(gpu, tmp_path):
    settings = BASE | OFF | {"data__image_size": 384, "data__device": "cuda", "launch__device": "cuda"}
    (said,) = gpu(trained, settings, tmp_path / "run")
    assert said.startswith("data.device (cuda) keeps the 0.247 GiB of digits in the memory of every GPU, and Fake")
    assert said.endswith("choose data.device=auto, or cpu")


def coarse(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def hungry(num_classes: int, in_channels: int) -> nn.Module:
    """Saves 0.6 MiB an image for its backward pass, of which an evaluation holds a twelfth at a time."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU()]
    for _ in range(9):
        layers += [nn.Conv2d(32, 32, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(32, num_classes))


def test_auto_finds_a_micro_size_that_fits(gpu, tmp_path):
    settings = BASE | OFF | {"model__name": f"{__name__}:hungry", "data__image_size": 16, "train__steps": 1}
    settings |= {"launch__device": "cuda", "batch__global_size": 512, "batch__micro_size": "auto"}
    assert gpu(trained, settings, tmp_path / "run") == [""]
    assert 1 <= read_info(tmp_path / "run")["micro_size"] <= 256
