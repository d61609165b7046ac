"""Dropout whose draws belong to samples, whatever the cut."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World
from gengap_dist.models.dropout import (
    SampleAlphaDropout,
    SampleChannelDropout,
    SampleDraws,
    SampleDropout,
    replace_random_layers,
)
from gengap_dist.models.sample_position import SamplePosition, position_of
from tests.conftest import config

NUM, UNITS = 64, 500


def masks(p: float, step: int = 0, layer: int = 0, start: int = 0, num: int = NUM, seed: int = 0) -> torch.Tensor:
    """[num, UNITS], 1 where a unit is kept."""
    position = SamplePosition()
    position.move_to(start, NUM, 1, seed, step)
    return SampleDropout(p, layer, position)(torch.ones(num, UNITS)) * (1 - p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p):
    kept = masks(p)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1.0]))
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    for along in (0, 1):  # no sample and no unit is special: 5 deviations of their means
        means = kept.mean(along)
        assert (means - (1 - p)).abs().max() < 5 * (p * (1 - p) / kept.shape[along]) ** 0.5


def test_draws_of_other_steps_layers_samples_and_seeds_are_others():
    """Two independent masks at p = 1/2 agree in half of the places."""
    one = masks(0.5)
    others = [masks(0.5, step=1), masks(0.5, layer=1), masks(0.5, seed=1), masks(0.5, step=1, layer=1), one.roll(1, 0)]
    others += [one.roll(1, 1), masks(0.5, start=NUM)]
    for other in others:
        assert abs((one == other).float().mean() - 0.5) < 4 * 0.5 / one.numel() ** 0.5
    assert torch.equal(one, masks(0.5))


def test_a_layer_called_twice_in_a_pass_draws_twice():
    """Again the same in another pass at the same place, as SAM makes one."""
    position = SamplePosition()
    dropout, x, passes = SampleDropout(0.5, 0, position), torch.ones(NUM, UNITS), []
    for _ in range(2):
        position.move_to(0, NUM, 1, 0, 0)
        passes.append((dropout(x), dropout(x)))
    (one, two), again = passes
    assert abs((one == two).float().mean() - 0.5) < 4 * 0.5 / one.numel() ** 0.5
    assert torch.equal(one, again[0])
    assert torch.equal(two, again[1])


@given(num=st.integers(1, 40), ranks=st.integers(1, 5), micro=st.integers(1, 12))
def test_a_samples_draws_are_its_own_however_the_batch_is_cut(num, ranks, micro):
    x = torch.arange(1.0, num * 6 + 1).view(num, 2, 3)
    position = SamplePosition()
    dropout = SampleDropout(0.5, 3, position)
    position.move_to(0, num, 1, 7, 1)
    want, parts = dropout(x), []
    for rank in range(ranks):
        for start, stop in BatchPlan(num, ranks, micro).micro_batches(rank):  # some are empty
            position.move_to(start, num, ranks, 7, 1)
            parts.append(dropout(x[start:stop]))
    assert torch.equal(torch.cat(parts), want)


def test_eval_is_the_identity_and_so_is_no_dropout():
    x = torch.randn(4, 3)
    assert SampleDropout(0.5, 0, SamplePosition()).eval()(x) is x
    assert SampleDropout(0.0, 0, SamplePosition())(x) is x


def test_everything_dropped():
    x = torch.randn(4, 3, requires_grad=True)
    out = SampleDropout(1.0, 0, SamplePosition())(x)
    out.sum().backward()
    assert not out.any()
    assert not x.grad.any()


def test_the_gradient_goes_through_the_same_mask():
    x = torch.randn(8, 5, requires_grad=True)
    out = SampleDropout(0.5, 0, SamplePosition())(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out != 0) * 2.0)
    half = x.detach().bfloat16()
    assert SampleDropout(0.5, 0, SamplePosition())(half).dtype == torch.bfloat16


class Own(nn.Dropout):
    pass


def test_known_layers_are_replaced_each_with_draws_of_its_own():
    shared = nn.Dropout(0.2)
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(shared, nn.Dropout2d(0.5)), Own(0.5), shared, nn.AlphaDropout())
    position = SamplePosition()
    replace_random_layers(net, position)
    new = [net[0], net[1][0], net[1][1], net[3], net[4]]
    assert [(type(layer), layer.p, layer.layer) for layer in new] == [
        (SampleDropout, 0.5, 0), (SampleDropout, 0.2, 1), (SampleChannelDropout, 0.5, 2), (SampleDropout, 0.2, 3),
        (SampleAlphaDropout, 0.5, 4),
    ]  # fmt: skip
    assert all(layer.position is position for layer in new)
    assert type(net[2]) is Own


class DropPath(nn.Module):
    """As in timm and transformers."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


KINDS = {  # a layer, and the shape of what it drops together in a sample of shape [3, 4, 5]
    "Dropout": (nn.Dropout(0.4), (3, 4, 5)),
    "Dropout1d": (nn.Dropout1d(0.4), (3, 1)),
    "Dropout2d": (nn.Dropout2d(0.4), (3, 1, 1)),
    "AlphaDropout": (nn.AlphaDropout(0.4), (3, 4, 5)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.4), (3, 1, 1)),
    "StochasticDepth": (StochasticDepth(0.4, "row"), (1, 1, 1)),
    "StochasticDepth of the batch": (StochasticDepth(0.4, "batch"), None),
    "DropPath": (DropPath(0.4), (1, 1, 1)),
}


def replaced(name: str, position: SamplePosition) -> nn.Module:
    net = nn.Sequential(copy.deepcopy(KINDS[name][0]))
    replace_random_layers(net, position)
    assert isinstance(net[0], SampleDraws)
    return net.train()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_draws_by_sample_however_the_batch_is_cut(name):
    position = SamplePosition()
    net = replaced(name, position)
    num, x = 23, torch.randn(23, 3, 4, 5)[..., 0 if name == "Dropout1d" else slice(None)]
    for step in range(3):
        position.move_to(0, num, 1, 7, step)
        want = net(x)
        for ranks, micro in ((1, 4), (3, 5)):
            parts = []
            for rank in range(ranks):
                for start, stop in BatchPlan(num, ranks, micro).micro_batches(rank):
                    position.move_to(start, num, ranks, 7, step)
                    parts.append(net(x[start:stop]))
            assert torch.equal(torch.cat(parts), want)
    assert torch.equal(net.eval()(x), x)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_drops_what_torchs_drops(name):
    """The same values together, with the same share, mean and scale."""
    torch.manual_seed(0)
    together, position = KINDS[name][1], SamplePosition()
    net, num = replaced(name, position), 4000
    x = torch.randn(num, 3, 4, 5)[..., 0 if name == "Dropout1d" else slice(None)]
    outs = []
    for step in range(1 if together else 200):
        position.move_to(0, num, 1, 0, step)
        outs.append(net(x))
    if "Alpha" in name:  # the same constant where something is dropped, and the same line where not
        dropped, facts = None, []
        for out in (copy.deepcopy(KINDS[name][0]).train()(x), outs[0]):
            constant = out.flatten().mode().values
            dropped = (out - constant).abs() < 1e-6
            facts.append([float(constant), *np.polyfit(x[~dropped].numpy(), out[~dropped].numpy(), 1)])
        assert facts[1] == pytest.approx(facts[0], rel=1e-4)
        assert abs(outs[0].mean()) < 0.05
        assert abs(outs[0].var() - 1) < 0.05
    else:
        dropped = outs[0] == 0
        kept = outs[0][~dropped] / x[~dropped]
        assert torch.allclose(kept, torch.full_like(kept, 1 / 0.6))
    if together is None:
        assert all(bool((out == 0).all()) or not bool((out == 0).any()) for out in outs)
        assert abs(sum(bool((out == 0).all()) for out in outs) / 200 - 0.4) < 5 * (0.24 / 200) ** 0.5
        return
    first = dropped[tuple(slice(0, size if size > 1 else 1) for size in (num, *together))]
    assert torch.equal(dropped, first.expand_as(dropped))
    assert abs(first.float().mean() - 0.4) < 5 * (0.24 / first.numel()) ** 0.5


def test_the_network_of_a_run_has_it():
    """C1 has two; they, and the groups of batch norm, look at one position."""
    net = models.from_config(
        config(model__name="c1", batch__global_size=8, batch__ghost_size=4), DataSpec.images(10, 1), World()
    )
    found = [module for module in net.modules() if hasattr(module, "position")]
    assert sum(isinstance(module, SampleDropout) for module in found) == 2
    assert len(found) == 6
    assert all(module.position is position_of(net) for module in found)
    images = torch.randn(8, 1, 32, 32)
    net.double()

    def out(step, start=0, stop=8):
        position_of(net).move_to(start, 8, 1, 0, step)
        return net(images[start:stop].double())

    assert torch.equal(out(0), out(0))
    assert not torch.allclose(out(0), out(1))
    torch.testing.assert_close(torch.cat([out(0, 0, 4), out(0, 4, 8)]), out(0), rtol=1e-12, atol=1e-12)
