"""The probe's laws: the same on any number of ranks, equal to a plain SVD, and nobody notices it was there."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import measure
from gengap_dist.probes.layer_view import LayerView
from gengap_dist.probes.spectra.cost import MeasurementCost
from gengap_dist.probes.spectra.measure import plan_passes
from gengap_dist.probes.trace import Layer

NUM = 201  # splits into blocks of 32 with a short last one: uneven on 2 and on 3 ranks


def setting(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.build(name, DataSpec.images(10, 1, 16), widths=(48, 32)).to(dtype)
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
def on(crews) -> dict[int, list[dict]]:
    return {size: crews[size](spectra) for size in (1, 2, 3)}


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
                true = true[: len(rows) - centred]
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
    with pytest.raises(UsageError, match=r"the network failed in a forward pass.*RuntimeError: .*channels"):
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


def test_views_of_tokens():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU()).double()
    x = torch.randn(17, 3, 6).double()
    found = {s.view: s for s in measure(model, [x], centred=[False], views=["token", "pool", "flatten"])}
    a = model(x).detach().numpy()
    for view, rows in {"token": a.reshape(51, 5), "pool": a.mean(1), "flatten": a.reshape(17, 15)}.items():
        true = np.linalg.svd(rows, compute_uv=False) / len(rows) ** 0.5
        s = found[view]
        assert (s.num_samples, s.num_units) == rows.shape
        assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


def test_non_finite_activations_are_left_out_with_a_warning():
    model, inputs = setting("lenet5", torch.float32)
    nn.init.constant_(model.fc1.affine.bias, float("nan"))
    with pytest.warns(UserWarning, match="layer fc[12] has non-finite"):
        found = measure(model, [inputs])
    assert {s.layer for s in found} == {"conv1", "conv2"}


def test_a_budget_that_is_too_small():
    model, inputs = setting("lenet5", torch.float32)
    with pytest.raises(UsageError, match=r"layer fc1 has 201 rows and 120 units.*120 x 120.*increase it to 1,"):
        measure(model, [inputs], layers="fc1", memory_mib=0)
    with pytest.raises(UsageError, match=r"layer conv1 has 201 rows and 864 units in view flatten.*202 x 202"):
        measure(model, [inputs], views=["flatten"], memory_mib=0, layers="conv1")


def test_passes_keep_the_budget():
    layer = Layer("x", nn.Identity(), 1, torch.Size([2, 8, 8, 8]), torch.float32, False, "")
    sites = [LayerView(layer, "flatten", 1, 100, width) for width in (4_000, 50, 300_000, 90_000, 700)]
    budget = 2**20 * 3 // 4
    passes = plan_passes(sites, 60, 1)
    for pieces in passes:
        assert (
            sum(16 * sites[n].size ** 2 for n in {p.view_index for p in pieces})
            + sum(240 * (p.stop - p.start) for p in pieces if sites[p.view_index].is_wide)
            <= budget
        )
    for number, site in enumerate(sites):
        cuts = [(p.start, p.stop) for pieces in passes for p in pieces if p.view_index == number]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == site.num_units
        assert all(before[1] == after[0] for before, after in pairwise(cuts))
    assert len(passes) >= 240 * 394_000 // budget  # it took them all


def test_a_small_budget_gives_the_same_spectra():
    model, inputs = setting("lenet5", torch.float32)
    views = ("channel", "pool", "flatten")
    whole = measure(model, [inputs], views=views)
    parts = measure(model, iter([inputs[:100], inputs[100:]]), views=views, memory_mib=1)  # takes several passes
    assert [s.key for s in whole] == [s.key for s in parts]
    for a, b in zip(whole, parts, strict=True):
        assert (a.singular_values - b.singular_values).abs().max() <= 1e-6 * a.singular_values[0]
        assert a.dead_units == b.dead_units


def test_passes_after_the_first_end_at_their_last_layer():
    model, inputs = setting("lenet5", torch.float32)
    runs = {"conv1": 0, "conv2": 0, "fc3": 0}
    for name in runs:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    cost = MeasurementCost()
    batches = inputs.split(32)
    measure(model, batches, views=["flatten"], layers="conv*", memory_mib=1, cost=cost)
    num_passes, traced = (runs["conv1"] - 1) // len(batches), 1
    assert num_passes == 6
    assert runs["fc3"] == traced + len(batches) + num_passes - 1  # the last batch of a pass goes to the end
    assert cost.seconds()["gram"] > 0 < cost.seconds()["decomposition"]


def test_a_layer_that_puts_out_no_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UsageError, match="layer 0 outputs tuple, needs one tensor"):
        measure(nn.Sequential(Pair(), nn.Identity()), [torch.randn(2, 3, 4)], layers="0")


def test_a_layer_whose_rows_are_not_the_samples():
    class Summary(nn.Module):
        def forward(self, x):
            return x.T @ x

    with pytest.raises(UsageError, match=r"layer 0 outputs \[4, 4\] for 5 samples and \[4, 4\] for two.*leave it out"):
        measure(nn.Sequential(Summary(), nn.Identity()), [torch.randn(5, 4)], layers="0")


def test_fewer_than_two_samples():
    for batches in ([], [torch.randn(1, 2)]):
        with pytest.raises(UsageError, match="needs at least 2"):
            measure(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), batches)


def test_views_that_a_layer_does_not_have():
    model, inputs = setting("lenet5", torch.float32)
    with pytest.raises(UsageError, match=r"probe.views \(token\) do not apply to layer conv1.*add channel or pool or"):
        measure(model, [inputs], views=["token"], layers="conv1")
    with pytest.warns(UserWarning, match=r"probe.views \(token\) do not apply to conv1, conv2: not measured"):
        assert {s.layer for s in measure(model, [inputs], views=["token"])} == {"fc1", "fc2"}
    with pytest.raises(UsageError, match=r"probe.views \(chanel\) is not a view"):
        measure(model, [inputs], views=["chanel"])
