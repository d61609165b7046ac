"""Running statistics that are made anew, against torch's own way to do it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import replace_batch_norm
from gengap_dist.models.dropout import SampleDropout, replace_random_layers
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.training.algorithms import update_bn as ours
from gengap_dist.training.algorithms.update_bn import recompute_running_stats, untrained_with_statistics


class Given:
    """Batches of one data set, as `Batches` hands them out; remembers which were asked for."""

    def __init__(self, num):
        self.samples = torch.randn(num, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
        self.samples += torch.arange(num)[:, None, None, None] / num  # as if sorted by class
        self.asked = []

    def __call__(self, indices, epoch):
        assert epoch == 0
        self.asked.append(indices)
        return self.samples[indices], indices


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(),
        nn.Linear(48, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2),
    ).double()  # fmt: skip


def found(world, num, block_size, kind="local", dropout=0.0):
    net = network(dropout)
    position = SamplePosition()
    replace_batch_norm(net, kind, ghost_size=2 if kind == "ghost" else None, position=position, world=world)
    replace_random_layers(net, position)
    net.eval()[0].train()
    given = Given(num)
    recompute_running_stats(net, given, world, block_size)
    assert not net.training  # nor anything else but what was
    assert [name for name, module in net.named_modules() if module.training] == ["0"]
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in net.modules())
    net(given.samples[:2])
    return {name: value for name, value in net.state_dict().items() if "running" in name}, given.asked


def close(got, want):
    assert [*got] == [*want]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("num", "block_size"), [(23, 4), (24, 4), (5, 8), (7, None)])
def test_like_torch_on_the_same_blocks(num, block_size):
    got, asked = found(World(), num, block_size)
    size = min(block_size or num, num)
    assert [len(indices) for indices in asked] == [size] * (num // size)  # a last block that is short is left out
    assert len(torch.cat(asked).unique()) == num // size * size
    net = network()
    update_bn([Given(num).samples[indices] for indices in asked], net)
    close(got, {name: value for name, value in net.state_dict().items() if "running" in name})


def test_a_layer_that_is_called_twice():
    """Its statistics are the mean over both calls, as update_bn has them."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1).double()

        def forward(self, x):
            return self.norm(3 * self.norm(x) + 1)

    net, twin, given = Twice(), Twice(), Given(12)
    recompute_running_stats(net, given, World(), 4)
    update_bn([given.samples[indices] for indices in given.asked], twin)
    close(net.state_dict(), twin.state_dict() | {"norm.num_batches_tracked": net.norm.num_batches_tracked})


def test_images_are_drawn_from_all(monkeypatch):
    """An image folder is sorted by class: the first images are of few."""
    monkeypatch.setattr(ours, "MAX_SAMPLES", 400)
    _, asked = found(World(), 4000, 100)
    assert len(asked) == 4
    for indices in asked:
        assert abs(indices.double().mean() - 2000) < 5 * 4000 / 12**0.5 / 10
    _, asked = found(World(), 4000, 1000)  # one block has more
    assert [len(indices) for indices in asked] == [1000]


@pytest.fixture(scope="module", params=[2, 3])
def crew(crews, request):
    return crews[request.param]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("num", [29, 4])  # 7 blocks, and one, which leaves ranks with none
@pytest.mark.parametrize("kind", ["local", "ghost", "sync"])
def test_the_same_on_any_number_of_ranks(crew, kind, num, dropout):
    """Of every kind: a block is what statistics are over."""
    want, _ = found(World(), num, 4, "local", dropout)
    answers = crew(found, num, 4, kind, dropout)
    for got, _ in answers:
        close(got, want)
        assert all(torch.equal(got[name], answers[0][0][name]) for name in got)
    assert sum(len(asked) for _, asked in answers) == num // 4


def test_dropout_is_on():
    plain, dropped = (found(World(), 24, 4, dropout=p)[0] for p in (0.0, 0.5))
    assert torch.equal(plain["1.running_mean"], dropped["1.running_mean"])
    assert not torch.allclose(plain["9.running_mean"], dropped["9.running_mean"])


def test_a_failure_leaves_the_network_as_it_was():
    net = network()
    replace_batch_norm(net, "ghost", ghost_size=2, position=SamplePosition(), world=World())
    net.eval()
    before = copy.deepcopy(net.state_dict())

    class Broken(Given):
        def __call__(self, indices, epoch):
            raise OSError("a file is gone")

    with pytest.raises(OSError, match="gone"):
        recompute_running_stats(net, Broken(8), World(), 4)
    assert not any(
        module.training or module._forward_pre_hooks or "forward" in vars(module) for module in net.modules()
    )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert net[1].momentum == 0.1
    assert not any(isinstance(module, SampleDropout) for module in net.modules())


def test_nothing_to_make_anew():
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    given = Given(8)
    recompute_running_stats(net, given, World(), 4)
    assert not given.asked


def test_an_untrained_network_is_shown_as_its_first_step_sees_it():
    """Every layer's output has mean 0 and variance 1 over the images; the network itself stays what it is."""
    net, given = network().eval(), Given(24)
    before = copy.deepcopy(net.state_dict())
    shown = untrained_with_statistics(net, given, World(), 24)
    seen = {}
    for name in ("1", "9"):
        shown[int(name)].register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    shown(given.samples)
    for out in seen.values():
        dims = [dim for dim in range(out.ndim) if dim != 1]
        torch.testing.assert_close(out.mean(dims), torch.zeros_like(out.mean(dims)), rtol=0, atol=1e-3)
        assert (out.var(dims) - 1).abs().max() < 0.1  # biased against unbiased
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    plain = nn.Linear(2, 2)
    assert untrained_with_statistics(plain, given, World(), None) is plain
