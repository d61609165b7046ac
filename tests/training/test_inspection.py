"""What a training pass of a network does that a run must know."""

import json

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models.dropout import replace_random_layers
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.inspection import inspect
from gengap_dist.training.tasks import Classification
from tests.conftest import config, train, weights

TASK = Classification(DataSpec.images(3, 1))
INPUTS, TARGETS = torch.randn(2, 6), torch.tensor([0, 2])


class Parts(nn.Module):
    """Each odd part at will."""

    def __init__(self, *odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.body, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.noise = nn.RReLU()
        self.spare = nn.Linear(2, 2)
        self.bilinear = nn.Linear(8, 8)
        if "spectral norm" in odd:
            self.bilinear = nn.utils.parametrizations.spectral_norm(self.bilinear)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        x = self.bilinear(self.drop(self.body(x)))
        if "function" in self.odd:
            x = F.dropout(x, 0.5, self.training)
        if "module" in self.odd:
            x = self.noise(x)
        if "counter" in self.odd and self.training:
            self.passes += 1
        return self.head(x)


def inspected(model: nn.Module):
    replace_random_layers(model, SamplePosition())
    return inspect(model, INPUTS, TARGETS, TASK)


def test_nothing_odd():
    found = inspected(Parts())
    assert found.unused_parameters == ["spare.weight", "spare.bias"]
    assert found.depends_on_ranks == []


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("function", ["itself"]),
        ("module", ["noise"]),
        ("counter", ["passes"]),
        ("spectral norm", ["bilinear.parametrizations.weight.0._u", "bilinear.parametrizations.weight.0._v"]),
    ],
)
def test_what_depends_on_the_number_of_ranks_is_named(odd, says):
    assert inspected(Parts(odd)).depends_on_ranks == says


def test_the_network_is_left_as_found():
    model = Parts("function", "counter", "spectral norm").train()
    model.drop.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    inspect(model, INPUTS, TARGETS, TASK)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_that_fails_is_left_to_its_first_step():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("in training only")

    assert inspect(Failing(), INPUTS, TARGETS, TASK).depends_on_ranks == []


def test_no_layer_of_efficientnet_depends_on_ranks():
    """It has stochastic depth, dropout and batch norm."""
    model = torchvision.models.efficientnet_b0(num_classes=3)
    replace_random_layers(model, SamplePosition())
    found = inspect(model, torch.randn(2, 3, 32, 32), TARGETS, TASK)
    assert (found.unused_parameters, found.depends_on_ranks) == ([], [])


class Deep(nn.Module):
    """Stochastic depth around a block, dropout of channels, and a parameter that nothing uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 4, 3, stride=2), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.depth = torchvision.ops.StochasticDepth(0.4, "row")
        self.drop, self.head, self.spare = nn.Dropout2d(0.3), nn.Linear(4, num_classes), nn.Linear(2, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.drop(x + self.depth(self.block(x)))
        return self.head(x.mean((2, 3)))


def deep(num_classes: int, in_channels: int) -> nn.Module:
    return Deep(num_classes)


@pytest.mark.processes
def test_a_run_with_random_layers_is_the_same_on_two_ranks(tmp_path, pools):
    """Also where a parameter gets no gradient; both are in the record."""
    settings = {"model__name": f"{__name__}:deep", "data__image_size": 12, "train__dtype": "float64"}
    settings |= {"batch__global_size": 50, "train__steps": 6, "probe__enabled": False}
    with pytest.warns(UserWarning, match="spare.weight, spare.bias of .*:deep take part in no training pass"):
        train(tmp_path / "1", **settings, batch__micro_size=50)
    pools[2].run(config(**settings, batch__micro_size=9), tmp_path / "2", resume=False, progress=lambda *about: None)
    losses = [[line["train/loss"] for line in read_metrics(tmp_path / size) if "train/loss" in line] for size in "12"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for key, value in weights(tmp_path / "1").items():
        assert torch.allclose(weights(tmp_path / "2")[key], value, rtol=0, atol=1e-12), key
    for size in "12":
        info = read_info(tmp_path / size)
        assert info.unused_parameters == ["spare.weight", "spare.bias"]
        assert info.depends_on_ranks == []


def random_function(num_classes: int, in_channels: int) -> nn.Module:
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.3, self.training))

    return Noisy(nn.Flatten(), nn.Linear(64, num_classes))


def test_a_run_says_what_depends_on_its_ranks(tmp_path):
    settings = {"model__name": f"{__name__}:random_function", "data__image_size": 8, "probe__enabled": False}
    with pytest.warns(UserWarning, match=r"itself of .*random_function draw random numbers by micro-batch"):
        train(tmp_path / "run", **settings, train__steps=1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["depends_on_ranks"] == ["itself"]
