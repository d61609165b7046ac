"""Every kind of batch norm against torch's own, applied to the samples that it is to be taken over."""

import copy
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import (
    GhostBatchNorm,
    SyncBatchNorm,
    _SyncBatchNormFunction,
    average_buffers,
    frozen_running_stats,
    has_batch_norm,
    replace_batch_norm,
)
from gengap_dist.models.sample_position import SamplePosition, position_of
from gengap_dist.parallel.strategies import Single
from gengap_dist.runs.run_folder import read_info
from gengap_dist.training.checks import check_norm, norm_group_sizes
from tests.conftest import config, train

PLAIN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""By number of dimensions behind the channels."""
PLAIN_RUN = config()


def treated(model: nn.Module, kind: str, ghost_size: int | None = None, world: World | None = None) -> nn.Module:
    """A copy of `model` with its batch norm treated."""
    model = copy.deepcopy(model)
    replace_batch_norm(model, kind, ghost_size=ghost_size, position=SamplePosition(), world=world or World())
    return model


def random_affine(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer


def close(got, want, dtype=torch.float64):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def close_states(got: nn.Module, want: nn.Module, dtype=torch.float64):
    """Running statistics and gradients."""
    for name in ("running_mean", "running_var"):
        close(getattr(got, name), getattr(want, name), dtype)
    for mine, theirs in zip(got.parameters(), want.parameters(), strict=True):
        close(mine.grad, theirs.grad, dtype)


# -- ghost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", PLAIN)
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, 0.3)])
def test_ghost_is_torchs_batch_norm_of_each_group_in_order(dims, affine, momentum, dtype):
    torch.manual_seed(dims)
    plain = random_affine(PLAIN[dims](3, eps=1e-3, momentum=momentum, affine=affine)).to(dtype)
    ghost = treated(nn.Sequential(plain), "ghost", 4)[0]
    for num in (12, 10, 4, 3):  # also a short last group, one group, and less than one
        x = (torch.randn(num, 3, *[2] * dims, dtype=dtype) * 3 + 5).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        pull = torch.randn_like(x)
        out = ghost(x)
        want = torch.cat([plain(group) for group in twin.split(4)])
        close(out, want, dtype)
        (out * pull).sum().backward()
        (want * pull).sum().backward()
        close(x.grad, twin.grad, dtype)
        close_states(ghost, plain, dtype)
    assert (ghost.running_mean - 5).abs().max() < 3
    x = torch.randn(5, 3, *[2] * dims, dtype=dtype)
    close(ghost.eval()(x), plain.eval()(x), dtype)


@pytest.mark.parametrize("in_a_run", [False, True])
def test_a_ghost_layer_that_is_called_twice(in_a_run):
    """As plain batch norm, which is given one group after the other; also with ghost_size = batch."""
    torch.manual_seed(0)
    plain = SharedNorm().double()
    for ghost_size, num in ((8, 8), (4, 10)):
        ghost, twin = treated(plain, "ghost", ghost_size), copy.deepcopy(plain)
        strategy = Single(PLAIN_RUN, World())
        strategy.setup(ghost, lambda model: torch.optim.SGD(model.parameters(), 0.1))
        for step in range(3):
            x = torch.randn(num, 3).double() * 2 + 1
            if in_a_run:
                strategy.begin_step(num)
                for start in range(0, num, ghost_size):
                    strategy.position.move_to(start, num, 1, step)
                    strategy.forward(x[start : start + ghost_size])
            else:
                for group in x.split(ghost_size):
                    ghost(group)
            for group in x.split(ghost_size):
                twin(group)
        for mine, theirs in zip(statistics(ghost), statistics(twin), strict=True):
            close(mine, theirs)


class SharedNorm(nn.Module):
    """One norm, called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.norm(x)).relu())


class Cut(NamedTuple):
    num: int
    ghost: int
    ranks: int
    micro: int


@st.composite
def cuts(draw):
    ghost = draw(st.integers(2, 5))
    cut = Cut(draw(st.integers(2, 24)), ghost, draw(st.integers(1, 5)), draw(st.integers(ghost, 3 * ghost)))
    assume(cut.num % ghost != 1)
    return cut


@settings(max_examples=25)
@given(cut=cuts(), average_each_step=st.booleans())
def test_ghost_does_not_know_ranks_and_micro_batches(cut, average_each_step):
    """A network of two ghost layers, three steps: its twin is the plain network, run on one group after the other."""
    torch.manual_seed(cut.num)
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    ranks = []
    for _ in range(cut.ranks):
        strategy = Single(PLAIN_RUN, World())
        strategy.setup(treated(plain, "ghost", cut.ghost), lambda model: torch.optim.SGD(model.parameters(), 0.1))
        ranks.append(strategy)
    plan = BatchPlan(cut.num, cut.ranks, cut.micro, cut.ghost)
    for step in range(3):
        x = torch.randn(cut.num, 2).double()
        pull = torch.randn(cut.num, 2).double()
        want = torch.cat([plain(group) for group in x.split(cut.ghost)])
        (want * pull).sum().backward()
        outs = []
        for rank, strategy in enumerate(ranks):
            strategy.begin_step(cut.num)
            for start, stop in plan.micro_batches(rank):
                if start == stop:  # as in `zero_contribution_pass`
                    strategy.model.eval()
                    strategy.forward(x[:1])
                    strategy.model.train()
                    continue
                strategy.position.move_to(start, cut.num, cut.ranks, step)
                outs.append(strategy.forward(x[start:stop]))
                (outs[-1] * pull[start:stop]).sum().backward()
        close(torch.cat(outs), want)
        networks = [strategy.model for strategy in ranks]
        means = [sum(same) / cut.ranks for same in zip(*map(statistics, networks), strict=True)]
        for mean, twin in zip(means, statistics(plain), strict=True):
            close(mean, twin)
        if average_each_step:
            for network in networks:
                for kept, mean in zip(statistics(network), means, strict=True):
                    kept.copy_(mean)
    for same, twin in zip(
        zip(*(network.parameters() for network in networks), strict=True), plain.parameters(), strict=True
    ):
        close(sum(p.grad for p in same if p.grad is not None), twin.grad)


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def test_all_ghost_layers_of_a_copy_look_at_one_position_of_their_own():
    net = treated(models.build("mlp", DataSpec.images(2, 1), widths=(4, 4)), "ghost", 2)
    twin = copy.deepcopy(net)
    position_of(twin).move_to(6, 12, 3)
    layers = [module for module in twin.modules() if isinstance(module, GhostBatchNorm)]
    assert [layer.position.start for layer in layers] == [6, 6]
    assert position_of(net) == SamplePosition()


# -- sync -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2, 3])
def crew(crews, request):
    crew = crews[request.param]
    crew.size = request.param
    return crew


@pytest.fixture(scope="module")
def pair(crews):
    return crews[2]


def shares(num: int, size: int) -> list[slice]:
    """Of unequal size; the last of three ranks has no sample."""
    ends = {1: [0, num], 2: [0, num - 2, num], 3: [0, num - 3, num, num]}[size]
    return [slice(a, b) for a, b in pairwise(ends)]


def sync_steps(world, plain, steps):
    """Outputs, gradients of this rank's samples, gradients of weights, statistics, after some steps."""
    layer = treated(nn.Sequential(plain), "sync", world=world)[0]
    assert type(layer) is SyncBatchNorm
    outs, grads = [], []
    for x, pull in steps:
        mine = shares(len(x), world.size)[world.rank]
        x = x[mine].requires_grad_()
        out = layer(x)
        (out * pull[mine]).sum().backward()
        outs.append(out.detach())
        grads.append(x.grad)
    return outs, grads, [p.grad for p in layer.parameters()], [layer.running_mean, layer.running_var]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dims", "affine"), [(0, True), (1, True), (2, True), (2, False), (3, False)])
def test_sync_is_torchs_batch_norm_of_everyones_samples(crew, dims, affine, dtype):
    torch.manual_seed(dims)
    plain = random_affine(PLAIN[dims](3, eps=1e-3, momentum=0.3, affine=affine)).to(dtype)
    shapes = [(num, 3, *[2] * dims) for num in (7, 5, 9)]
    steps = [(torch.randn(shape, dtype=dtype) * 3 + 5, torch.randn(shape, dtype=dtype)) for shape in shapes]
    found = crew(sync_steps, plain, steps)
    for number, (x, pull) in enumerate(steps):
        x.requires_grad_()
        want = plain(x)
        (want * pull).sum().backward()
        close(torch.cat([outs[number] for outs, *_ in found]), want, dtype)
        close(torch.cat([grads[number] for _, grads, *_ in found]), x.grad, dtype)
    for number, parameter in enumerate(plain.parameters()):
        close(sum(weights[number] for *_, weights, _ in found), parameter.grad, dtype)
    for *_, (mean, var) in found:
        close(mean, plain.running_mean, dtype)
        close(var, plain.running_var, dtype)
        assert torch.equal(mean, found[0][-1][0])
        assert torch.equal(var, found[0][-1][1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_of_the_function_over_ranks(affine, channels_last):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 2, 2).double()
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    weights = [torch.randn(2).double().requires_grad_() for _ in range(2)] if affine else [None, None]
    assert torch.autograd.gradcheck(
        lambda *given: _SyncBatchNormFunction.apply(*given, 1e-3, World())[0], (x, *weights)
    )


def numeric(world, x, pull):
    """Gradient of a sum over both ranks by x, by autograd and by central differences."""
    torch.manual_seed(0)
    layer = random_affine(SyncBatchNorm(2, world)).double()
    mine = shares(len(x), world.size)[world.rank]

    def value(x):
        return (layer(x[mine]).sin() * pull[mine]).sum()

    x.requires_grad_()
    value(x).backward()
    world.all_reduce(x.grad)
    found = torch.zeros_like(x)
    with torch.no_grad():
        for at in range(x.numel()):
            for sign in (1, -1):
                moved = x.detach().clone()
                moved.view(-1)[at] += sign * 1e-6
                found.view(-1)[at] += sign * world.all_reduce(value(moved)) / 2e-6
    return x.grad, found


def test_gradient_across_ranks_by_differences(pair):
    torch.manual_seed(1)
    for by_autograd, by_difference in pair(numeric, torch.randn(5, 2, 2).double(), torch.randn(5, 2, 2).double()):
        torch.testing.assert_close(by_autograd, by_difference, rtol=1e-6, atol=1e-8)


def test_sync_far_from_zero_is_as_good_as_torchs(pair):
    """Mean 1,000 times the deviation, float32: errors against float64."""
    torch.manual_seed(2)
    x, pull = torch.randn(64, 3, 4) + 1000, torch.randn(64, 3, 4)
    plain = nn.BatchNorm1d(3)
    found = pair(sync_steps, plain, [(x, pull)])

    def by_torch(dtype):
        given = x.detach().to(dtype).requires_grad_()
        layer = copy.deepcopy(plain).to(dtype)
        out = layer(given)
        (out * pull).sum().backward()
        return [out.detach(), given.grad, layer.running_mean, layer.running_var]

    got = [torch.cat([rank[0][0] for rank in found]), torch.cat([rank[1][0] for rank in found]), *found[0][3]]
    for mine, theirs, exact in zip(got, by_torch(torch.float32), by_torch(torch.float64), strict=True):
        assert (mine - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 1e-7 * exact.abs().max()


def autocast_step(world, kind):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net = net if kind == "torch" else treated(net, kind, 8 if kind == "ghost" else None, world)
    mine = slice(0, 8) if kind != "sync" else shares(8, world.size)[world.rank]
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x[mine])
        (out * torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(1))[mine]).sum().backward()
    return (
        out.detach(),
        world.all_reduce(net[0].weight.grad) / (1 if kind == "sync" else world.size),
        net[1].running_var,
    )


def test_under_autocast(pair):
    """Statistics stay in float32; outputs are in bfloat16, as torch's are."""
    (want, gradient, var), _ = pair(autocast_step, "torch")
    for kind in ("ghost", "sync"):
        found = pair(autocast_step, kind)
        out = torch.cat([rank[0] for rank in found]) if kind == "sync" else found[0][0]
        assert out.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
        torch.testing.assert_close(found[0][1], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))
        torch.testing.assert_close(found[0][2], var, rtol=1e-4, atol=1e-5)


def nothing_at_all(world):
    layer = random_affine(SyncBatchNorm(2, world))
    layer(torch.zeros(0, 2, 3, 3, requires_grad=True)).sum().backward()
    return layer.running_mean, layer.running_var, layer.weight.grad


def test_a_step_of_no_samples_on_any_rank_changes_nothing(pair):
    """As ranks do before the first step, where the engine reorders its sums."""
    for mean, var, gradient in pair(nothing_at_all):
        assert mean.tolist() == gradient.tolist() == [0, 0]
        assert var.tolist() == [1, 1]


class Deaf(World):
    def all_reduce(self, tensor, label="sum"):
        raise AssertionError("asked to talk")


def test_sync_talks_in_training_only_and_a_copy_talks_to_the_same_ranks():
    world = Deaf(0, 2)
    net = treated(nn.Sequential(nn.BatchNorm1d(3)), "sync", world=world)
    twin = copy.deepcopy(net)
    assert twin[0].world is world
    assert twin[0].weight is not net[0].weight
    with pytest.raises(AssertionError, match="asked to talk"):
        net(torch.randn(4, 3))
    net.eval()(torch.randn(4, 3))


def test_sync_over_ranks_refuses_a_second_derivative():
    x = torch.randn(4, 2, requires_grad=True)
    out, *_ = _SyncBatchNormFunction.apply(x, None, None, 1e-5, World())
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("layer", [GhostBatchNorm(3, 2), SyncBatchNorm(3, World())])
def test_one_dimension_is_not_enough(layer):
    with pytest.raises(ValueError, match=r"batch norm needs \[n, C, ...\], got \[3\]"):
        layer(torch.randn(3))


# -- treat ------------------------------------------------------------------------------------------------------------


NETWORKS = {
    "c1": 32,
    "f1": 28,
    "resnet20": 32,
    "torchvision:resnet18": 32,
    "timm:mobilenetv3_small_050": 32,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_the_same_in_eval_and_in_training_over_one_group(name):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'gengap_dist[timm]'")
    torch.manual_seed(0)
    net = models.build(name, DataSpec.images(10, 1, NETWORKS[name])).double()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            random_affine(module)
            module.running_mean.normal_()
    images = torch.randn(4, 1, NETWORKS[name], NETWORKS[name]).double()
    before = [*map(id, net.parameters()), *map(id, net.buffers())]
    frozen_one = next(module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d))
    frozen_one.bias.requires_grad_(False)
    with torch.no_grad():
        wanted = copy.deepcopy(net).train()(images), copy.deepcopy(net).eval()(images)
        for kind, size in (("ghost", 4), ("sync", None)):
            again = copy.deepcopy(net)
            replace_batch_norm(net, kind, ghost_size=size, position=SamplePosition(), world=World())
            assert sorted(before) == sorted([*map(id, net.parameters()), *map(id, net.buffers())])
            assert sum(not p.requires_grad for p in net.parameters()) == 1
            kinds = {type(module) for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
            assert kinds == {GhostBatchNorm if kind == "ghost" else SyncBatchNorm}
            close(copy.deepcopy(net).train()(images), wanted[0])
            close(net.eval()(images), wanted[1])
            net, before = again, [*map(id, again.parameters()), *map(id, again.buffers())]


def test_parameters_keep_their_order_and_names():
    """Optimizers, checkpoints and seeds go by them."""
    net = models.build("resnet20", DataSpec.images(10, 3))
    for kind, size in (("local", None), ("ghost", 2), ("sync", None)):
        twin = treated(net, kind, size)
        assert [*twin.state_dict()] == [*net.state_dict()]
    assert all(type(a) is type(b) for a, b in zip(net.modules(), treated(net, "local").modules(), strict=True))
    assert [name for name, _ in treated(net, "group").named_parameters()] == [
        name for name, _ in net.named_parameters()
    ]


def test_group():
    """Of 16 channels, or of the largest divisor that both have; a sample's output is its own."""
    torch.manual_seed(0)
    sizes = {64: 4, 24: 3, 16: 1, 8: 1, 7: 1}
    net = nn.Sequential(*[nn.BatchNorm2d(channels, eps=1e-3) for channels in sizes], nn.BatchNorm2d(4, affine=False))
    *norms, bare = treated(net, "group")
    assert [norm.num_groups for norm in norms] == [*sizes.values()]
    assert all(type(norm) is nn.GroupNorm and norm.eps == 1e-3 for norm in norms)
    assert not list(bare.parameters())
    x = torch.randn(3, 64, 2, 2)
    close(norms[0](x)[:1], norms[0](x[:1]), torch.float32)
    blocks = x.view(3, 4, -1)
    want = (blocks - blocks.mean(2, keepdim=True)) / (blocks.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
    close(norms[0](x), want.view_as(x), torch.float32)
    assert not has_batch_norm(treated(net, "group"))


def test_none():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU())
    x = torch.randn(4, 2)
    assert torch.equal(treated(net, "none")(x), net[0](x).relu())
    assert not has_batch_norm(treated(net, "none"))


def test_a_layer_that_goes_by_two_names_is_one_layer():
    norm = nn.BatchNorm1d(3)
    net = treated(nn.Sequential(norm, nn.ReLU(), norm), "ghost", 2)
    assert net[0] is net[2]
    assert type(net[0]) is GhostBatchNorm


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("kind", ["ghost", "sync", "group", "none"])
@pytest.mark.parametrize("layer", [Own(3), nn.SyncBatchNorm(3)])
def test_other_kinds_of_batch_norm_are_refused(layer, kind):
    net = nn.Sequential(nn.Sequential(layer))
    with pytest.raises(UsageError, match=rf"model.norm cannot replace 0.0, a {type(layer).__name__}: leave it unset"):
        treated(net, kind, 2)
    assert type(treated(net, "local")[0][0]) is type(layer)


@pytest.mark.parametrize("kind", ["ghost", "sync"])
def test_a_cumulative_average_is_refused(kind):
    with pytest.raises(UsageError, match=rf"model.norm \({kind}\) cannot replace 0, whose momentum is None"):
        treated(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), kind, 2)


@pytest.mark.parametrize("norm", [{"batch__ghost_size": 10}, {"model__norm": "sync"}, {"model__norm": "group"}])
def test_a_network_without_batch_norm_is_refused(tmp_path, norm):
    with pytest.raises(UsageError, match=r"model.norm \(\w+\) has no effect on LeNet5, which has no batch norm"):
        train(tmp_path / "run", train__steps=1, batch__global_size=20, **norm)


# -- running statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "ghost", "sync"])
def test_frozen(kind):
    net = treated(nn.Sequential(nn.BatchNorm1d(3)), kind, 2 if kind == "ghost" else None)
    net(torch.randn(6, 3))
    before = [buffer.clone() for buffer in statistics(net)]
    with frozen_running_stats(net):
        net(torch.randn(6, 3) + 10)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(net), strict=True))
    assert net[0].momentum == 0.1
    net(torch.randn(6, 3) + 10)
    assert (net[0].running_mean > before[0] + 0.5).all()


def frozen_over_ranks(world):
    net = treated(nn.Sequential(nn.BatchNorm1d(3)), "sync", world=world)
    with frozen_running_stats(net):
        net(torch.randn(6, 3) + 10)
    return statistics(net)


def test_frozen_over_ranks(pair):
    for mean, var in pair(frozen_over_ranks):
        assert mean.tolist() == [0] * 3
        assert var.tolist() == [1] * 3


def averaged(world):
    net = nn.Sequential(nn.BatchNorm1d(2))
    net[0].running_mean += world.rank
    net[0].running_var *= 3 * world.rank + 1
    net[0].num_batches_tracked += world.rank
    net.register_buffer("mask", torch.full((2,), torch.finfo().min))
    net.register_buffer("wide", torch.tensor(1.0 + world.rank, dtype=torch.float64))
    average_buffers(net, world)
    return {name: buffer.tolist() for name, buffer in net.named_buffers()}


def test_averages_over_ranks(crew):
    middle = (crew.size - 1) / 2
    for rank, found in enumerate(crew(averaged)):
        assert found.pop("0.num_batches_tracked") == rank
        assert found.pop("mask") == pytest.approx([torch.finfo().min] * 2)
        assert found.pop("wide") == pytest.approx(1 + middle)
        assert found == {
            "0.running_mean": pytest.approx([middle] * 2),
            "0.running_var": pytest.approx([3 * middle + 1] * 2),
        }


# -- sizes ------------------------------------------------------------------------------------------------------------

NET = nn.Sequential(nn.BatchNorm1d(2))


def checked(sizes, num_ranks, **settings):
    given = config(model__name="mlp", **settings)
    check_norm(given, NET, sizes, num_ranks)
    return norm_group_sizes(given, NET, sizes, num_ranks)


def test_sizes_that_are_told():
    assert checked([64], 1, batch__global_size=64) == [64]
    assert checked([64], 2, batch__global_size=64, batch__micro_size=12) == [10, 11]  # 32 = 11 + 11 + 10
    assert checked([64], 3, batch__global_size=64) == [21, 22]
    assert checked([64], 3, batch__global_size=64, batch__ghost_size=16) == [16]
    assert checked([64], 3, batch__global_size=64, model__norm="sync") == [64]
    assert checked([64, 128], 1, batch__global_size=64) == [64, 128]  # a batch that grows
    given = config(batch__global_size=64)
    assert norm_group_sizes(given, nn.Sequential(nn.Linear(2, 2)), [64], 2) is None
    check_norm(given, nn.Sequential(nn.Linear(2, 2)), [1], 1)  # which has no groups


@pytest.mark.parametrize(
    ("ranks", "share", "ragged"),
    [(1, 64, ()), (2, 32, ()), (3, 22, (7,))],
)
def test_sync_needs_a_ranks_share_at_once(ranks, share, ragged):
    settings = dict(batch__global_size=64, model__norm="sync")
    assert checked([64, *ragged], ranks, batch__micro_size=share, **settings) == sorted({64, *ragged})
    with pytest.raises(
        UsageError,
        match=rf"batch.micro_size \({share - 1}\) splits the {share} samples of a rank in a step of 64, and "
        rf"model.norm \(sync\) .* choose at least {share}, more ranks, or model.norm=ghost",
    ):
        checked([64, *ragged], ranks, batch__micro_size=share - 1, **settings)


@pytest.mark.parametrize(
    ("sizes", "ranks", "settings"),
    [
        ([64, 1], 1, {}),  # a last step of one sample
        ([64, 5], 3, {}),  # 1 + 2 + 2
        ([64, 3], 1, {"batch__micro_size": 2}),  # 1 + 2
        ([64, 33], 2, {"batch__ghost_size": 16}),  # 16 + 16 + 1
        ([64, 1], 1, {"model__norm": "sync"}),
    ],
)
def test_groups_of_one_are_refused(sizes, ranks, settings):
    with pytest.raises(
        UsageError,
        match=rf"\(64\) on {ranks} rank\(s\) leaves batch norm a group of one sample in a step of {sizes[1]}",
    ):
        checked(sizes, ranks, batch__global_size=64, **settings)


def test_uneven_groups_and_sync_of_a_sample_each_are_fine():
    assert checked([64, 5], 1, batch__global_size=64, batch__micro_size=4) == [2, 3, 4]
    assert checked([2], 2, batch__global_size=2, model__norm="sync") == [2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch__micro_size": 20}, [16, 17]),
        ({"batch__ghost_size": 10}, [10]),
        ({"model__norm": "sync"}, [50]),
        ({"model__norm": "group"}, None),
    ],
)
def test_a_run_says_what_its_batch_norm_is_over(tmp_path, settings, told):
    train(
        tmp_path / "run",
        train__steps=2,
        batch__global_size=50,
        model__name="mlp",
        model__widths=(8,),
        probe__num_samples=50,
        **settings,
    )
    assert read_info(tmp_path / "run").norm_size == told
