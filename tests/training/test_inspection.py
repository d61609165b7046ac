"""What a training pass of a network does that a run must know."""

import json
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


class Stepped(nn.Module):
    """Runs a function of itself."""

    def __init__(self, step, **parts) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, 6), nn.Linear(6, 3), step
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.step(self, self.first(x)))


class Noise(nn.Module):
    def forward(self, x):
        return x.add_(torch.randn_like(x))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("step", "parts", "says"),
    [
        (lambda net, x: net.noise(x), {"noise": Noise()}, ["noise"]),  # in place
        (lambda net, x: net.keyed(x=net.noise(x)), {"noise": Noise(), "keyed": ByKeyword()}, ["noise"]),
        (lambda net, x: x * (torch.rand([]) > 0.01), {}, ["itself"]),  # which two passes seldom show
        (lambda net, x: x * (random.random() > 0.01), {}, ["itself"]),
        (lambda net, x: x * np.random.rand(), {}, ["itself"]),  # noqa: NPY002
        (lambda net, x: x * torch.nan, {}, []),
        (lambda net, x: net.drop(x.view(2, 3, 2).flatten(0, 1)).view(2, 6), {"drop": nn.Dropout(0.1)}, ["drop"]),
        (lambda net, x: checkpoint(net.inner, x, use_reentrant=True), {"inner": nn.Linear(6, 6)}, []),
    ],
)
def test_odd_steps(step, parts, says):
    model = Stepped(step, **parts)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    found = inspected(model)
    assert found.depends_on_ranks == says
    assert found.unused_parameters == []
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


class Initialised(nn.Module):
    """Takes its values from its first batch, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.done = nn.Parameter(torch.zeros(6)), False

    def forward(self, x):
        if not self.done:
            self.shift.data.copy_(x.mean(0))
            self.done = True
        return x - self.shift


def test_what_a_network_takes_from_its_first_batch_is_not_taken_from_an_inspection():
    model = Stepped(lambda net, x: net.norm(x), norm=Initialised())
    inspect(model, INPUTS, TARGETS, TASK)
    assert not model.norm.done
    assert not model.norm.shift.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_a_users_own_checkpointing(reentrant):
    """The mask of the recomputation is that of the pass; also for a block that is called twice."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5))
    plain = nn.Sequential(block, block, nn.Linear(6, 3))
    position = SamplePosition()
    replace_random_layers(plain, position)
    gradients = []
    for checkpointed in (False, True):
        position.move_to(0, 2, 1, 7)
        hidden = INPUTS.clone().requires_grad_()
        for part in plain[:2]:
            hidden = checkpoint(part, hidden, use_reentrant=reentrant) if checkpointed else part(hidden)
        plain.zero_grad()
        plain[2](hidden).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    assert torch.allclose(*gradients)


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
    with pytest.warns(UserWarning, match="spare.weight, spare.bias of .*:deep got no gradient in a pass"):
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
