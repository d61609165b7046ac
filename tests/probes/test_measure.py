"""The probe's laws: the same on any number of ranks, equal to a plain SVD, and nobody notices it was there."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config import UsageError
from gengap_dist.loop import blocks
from gengap_dist.probes import measure
from gengap_dist.world import World
from tests.ranks import on_ranks

NUM = 201  # splits into blocks of 32 with a short last one: uneven on 2 and on 3 ranks


def setting(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.build(name, num_classes=10, in_channels=1, image_size=16, widths=(48, 32)).to(dtype)
    return model, torch.randn(NUM, 1, 16, 16, dtype=dtype)


def spectra(world: World) -> dict:
    out = {}
    for name in ("lenet5", "mlp"):
        for dtype in (torch.float64, torch.float32):
            model, inputs = setting(name, dtype)
            mine = [inputs[a:b] for a, b in blocks(NUM, 32, world)]
            for s in measure(model, mine, world=world, views=("channel", "pool", "flatten")):
                out[name, dtype, s.key] = (s.singular_values.numpy(), s.num_samples, s.dead_units)
            few = [inputs[:20]] if world.rank == 0 else []  # the other ranks have nothing to give
            for s in measure(model, few, world=world):
                out[name, dtype, "few", s.key] = (s.singular_values.numpy(), s.num_samples, s.dead_units)
    return out


@pytest.fixture(scope="module")
def on() -> dict[int, list[dict]]:
    return {size: on_ranks(size, spectra) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_sharding_law(on, size):
    alone = on[1][0]
    assert len(alone) > 30
    for rank in range(size):
        assert on[size][rank].keys() == alone.keys()
        for key, (values, num_samples, dead_units) in on[size][rank].items():
            assert np.abs(values - alone[key][0]).max() <= 1e-9 * alone[key][0][0], key
            assert (num_samples, dead_units) == alone[key][1:]


def activations(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The slow way: run layer by layer and keep everything."""
    model.eval()
    out = {}
    x = inputs
    with torch.no_grad():
        for name, child in model.named_children():
            if name == "fc1" and x.ndim == 4:
                x = x.flatten(1)
            if isinstance(child, nn.Sequential):
                for part, layer in child.named_children():
                    x = layer(x)
                    if part == "act":
                        out[name] = x
            else:
                x = child(x)
    return out


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
def test_equal_to_numpys_svd_of_the_gathered_activations(on, name):
    model, inputs = setting(name, torch.float64)
    for layer, a in activations(model, inputs).items():
        views = {"": a}
        if a.ndim == 4:
            views = {
                "channel": a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]),
                "pool": a.mean((2, 3)),
                "flatten": a.flatten(1),
            }
        for view, matrix in views.items():
            for centred in (False, True):
                rows = matrix.numpy()
                true = np.linalg.svd(rows - centred * rows.mean(0), compute_uv=False) / len(rows) ** 0.5
                key = "/".join(filter(None, (layer, view, "centred" if centred else "")))
                for size in (1, 2, 3):
                    found, num_samples, _ = on[size][0][name, torch.float64, key]
                    assert num_samples == len(rows)
                    assert np.abs(found - true).max() <= 1e-7 * true[0], (key, size)


class Fussy(nn.Module):
    """Everything a probe could disturb: batch norm, dropout, a frozen part in eval mode, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 10)
        self.norm.eval()

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.head(self.drop(self.act(x.mean((2, 3)))))


def test_model_is_left_as_found():
    torch.manual_seed(0)
    model = Fussy()
    model.drop.train()
    fired = []
    model.act.register_forward_hook(lambda *_: fired.append(1))
    model(torch.randn(3, 1, 8, 8)).sum().backward()
    before = copy.deepcopy({k: v.clone() for k, v in model.state_dict().items()})
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    found = measure(model, [torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))])
    assert [s.key for s in found if not s.centred] == ["act/channel", "act/pool", "act#2"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()


def test_model_is_left_as_found_when_the_forward_pass_fails():
    model = Fussy().train()
    with pytest.raises(RuntimeError):
        measure(model, [torch.randn(9, 3, 8, 8)])
    assert model.training
    assert not model.act._forward_hooks


def test_layers_by_name_and_glob():
    model, inputs = setting("lenet5", torch.float32)
    keys = [s.layer for s in measure(model, [inputs], layers=["fc*"], centred=[False])]
    assert keys == ["fc1", "fc2", "fc3"]
    assert [s.layer for s in measure(model, [inputs], layers="fc2.affine", centred=[False])] == ["fc2.affine"]
    with pytest.raises(UsageError, match=r"probe.layers \(fc22\) matches no layer of LeNet5 \(did you mean fc2\?\)"):
        measure(model, [inputs], layers="fc22")


def test_token_activations():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU())
    x = torch.randn(7, 3, 6).double()
    (s,) = measure(model.double(), [x], centred=[False])
    assert (s.view, s.num_samples, s.num_units) == ("token", 21, 5)
    true = np.linalg.svd(model(x).detach().reshape(21, 5).numpy(), compute_uv=False) / 21**0.5
    assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


def test_non_finite_activations_are_left_out_with_a_warning():
    model, inputs = setting("lenet5", torch.float32)
    nn.init.constant_(model.fc1.affine.bias, float("nan"))
    with pytest.warns(UserWarning, match="layer fc[12] has non-finite"):
        found = measure(model, [inputs])
    assert {s.layer for s in found} == {"conv1", "conv2"}


def test_wide_layers_say_not_yet():
    model, inputs = setting("lenet5", torch.float32)
    with pytest.raises(UsageError, match=r"layer conv1 has 864 units.*not there yet"):
        measure(model, [inputs], views=["flatten"], memory_mib=5)


def test_a_layer_that_puts_out_no_tensor():
    with pytest.raises(UsageError, match="layer 0 puts out tuple"):
        measure(nn.Sequential(nn.LSTM(4, 4), nn.Identity()), [torch.randn(2, 3, 4)], layers="0")


def test_no_inputs_anywhere():
    with pytest.raises(ValueError, match="no rank has any inputs"):
        measure(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [])
