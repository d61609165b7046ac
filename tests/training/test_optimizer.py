"""Optimizers in float64 against their formulas, written out here, over a network with biases and norm parameters."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gengap_dist.config.sections import OptimConfig
from gengap_dist.training.optimizer import build_optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def gradients(weights: list[Tensor]) -> list[Tensor]:
    """Of a function with curvature that differs from entry to entry, and long enough to be clipped by a norm of 1."""
    return [3 * w.sin() + 2 * (1 + torch.arange(w.numel()).double().view(w.shape).cos()) * w for w in weights]


def agree(config: OptimConfig, rule: Callable[[Tensor, Tensor, dict, int], Tensor], num_steps: int = 5) -> None:
    """Five steps of `build(config)` and of `rule(w, g, memory, step)`."""
    net = network()
    optimizer, memories = build_optimizer(config, net), [{} for _ in net.parameters()]
    expected = [p.detach().clone() for p in net.parameters()]
    for step in range(1, num_steps + 1):
        for p, g in zip(net.parameters(), gradients([p.detach() for p in net.parameters()]), strict=True):
            p.grad = g
        optimizer.step()
        found = zip(expected, gradients(expected), memories, strict=True)
        expected = [rule(w, g, memory, step) for w, g, memory in found]
        for p, w in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    def rule(w, g, memory, step):
        g = g + 0.01 * w
        u = memory["u"] = 0.5 * memory.get("u", 0) + g
        return w - 0.1 * (g + 0.5 * u if nesterov else u)

    agree(OptimConfig(name="sgd", lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.01), rule)


BETAS = (0.9, 0.999)
ADAM = [{}, {"betas": (0.7, 0.95), "eps": 1e-3}]  # settings of AdamW and LAMB


def adam(
    g: Tensor, memory: dict[str, Tensor | float], step: int, eps: float, betas: tuple[float, float] = BETAS
) -> Tensor:
    a, b = betas
    m = memory["m"] = a * memory.get("m", 0.0) + (1 - a) * g
    v = memory["v"] = b * memory.get("v", 0.0) + (1 - b) * g * g
    return (m / (1 - a**step)) / ((v / (1 - b**step)).sqrt() + eps)


@pytest.mark.parametrize("given", ADAM)
def test_adamw(given):
    def rule(w, g, memory, step):
        return w * (1 - 0.1 * 0.01) - 0.1 * adam(g, memory, step, given.get("eps", 1e-8), given.get("betas", BETAS))

    agree(OptimConfig(name="adamw", lr=0.1, weight_decay=0.01, **given), rule)


@pytest.mark.parametrize("decay", [0.01, 0.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_follows_its_paper(decay, nesterov):
    """Local rate eta |w| / (|g| + beta |w|), eta = 0.001 (You et al. 2017).

    timm's has three liberties: 1e-8 in the denominator, no adaptation without decay unless told (we tell it), and
    momentum that takes every new rate, where the paper keeps v = m v + lr rate g (optim.momentum_correction=false, see
    test_schedule).
    """
    pytest.importorskip("timm", reason="timm is not installed")

    def rule(w, g, memory, step):
        if w.ndim > 1:
            g = 0.001 * w.norm() / (g.norm() + decay * w.norm() + 1e-8) * (g + decay * w)
        u = memory["u"] = 0.5 * memory.get("u", 0) + g
        return w - 0.1 * (g + 0.5 * u if nesterov else u)

    agree(OptimConfig(name="lars", lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=decay), rule)


@pytest.mark.parametrize("given", ADAM)
@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_lamb_follows_its_paper(decay, given):
    """Ratio |w| / |r + lambda w| on r = m / (sqrt(v) + 1e-6), both unbiased (You et al. 2020, phi(z) = z).

    timm would clip the global gradient at norm 1 first, and adapt nothing without decay; neither is in the paper.
    """
    pytest.importorskip("timm", reason="timm is not installed")

    def rule(w, g, memory, step):
        r = adam(g, memory, step, given.get("eps", 1e-6), given.get("betas", BETAS))
        if w.ndim > 1:
            r = r + decay * w
            r = r * w.norm() / r.norm()
        return w - 0.1 * r

    agree(OptimConfig(name="lamb", lr=0.1, weight_decay=decay, **given), rule)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_layer_of_zeros_has_the_ratio_1(name):
    """The paper's ratio would keep it at zero for ever."""
    pytest.importorskip("timm", reason="timm is not installed")
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), layer)
    layer.weight.grad = torch.full((2, 2), 3.0).double()
    optimizer.step()
    step = {"lars": 0.3, "lamb": 0.1 * 3 / (3 + 1e-6)}[name]
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), -step).double())


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_biases_and_norm_parameters_are_neither_adapted_nor_decayed(name):
    pytest.importorskip("timm", reason="timm is not installed")
    net = network()
    groups = build_optimizer(OptimConfig(name=name, weight_decay=0.1), net).param_groups
    found = [[id(p) for p in group["params"]] for group in groups]
    assert found == [
        [id(net[0].weight), id(net[2].weight)],
        [id(net[0].bias), id(net[1].weight), id(net[1].bias), id(net[2].bias)],
    ]
    assert [(group["weight_decay"], group["always_adapt"]) for group in groups] == [(0.1, True), (0.0, False)]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_an_optimizer_goes_on_from_the_states_of_its_parameters(name):
    """Which is all that a checkpoint holds: counts of steps have to be among them."""
    if name in ("lars", "lamb"):
        pytest.importorskip("timm", reason="timm is not installed")
    config, nets = OptimConfig(name=name, lr=0.1, weight_decay=0.01), (network(), network())
    through, first = (build_optimizer(config, net) for net in nets)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for p, g in zip(net.parameters(), gradients([p.detach() for p in net.parameters()]), strict=True):
            p.grad = g
        optimizer.step()

    for _ in range(3):
        step(nets[0], through)
        step(nets[1], first)
    again = build_optimizer(config, nets[1])
    for p in nets[1].parameters():
        again.state[p] = {key: value.clone() for key, value in first.state[p].items()}
    for _ in range(3):
        step(nets[0], through)
        step(nets[1], again)
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)


class Mixed(nn.Module):
    """A weight of its own, and what no optimizer should adapt: a norm of two dimensions, a scale, a table, a token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.LayerNorm((4, 6, 6))
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 6))
        self.mask_token = nn.Parameter(torch.ones(1, 2, 6))
        self.W = nn.Parameter(torch.ones(6, 3))
        self.attention = nn.MultiheadAttention(6, 2)
        self.one = nn.Linear(6, 1)
        self.gru = nn.GRU(6, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_only_weights_of_layers_are_adapted_and_decayed(name):
    """By the kind of the module, not by the number of dimensions."""
    pytest.importorskip("timm", reason="timm is not installed")
    model = Mixed()
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    adapted, others = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(adapted) == sorted([
        "W", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "one.weight", "gru.weight_ih_l0",
        "gru.weight_hh_l0", "normed.parametrizations.weight.original1",
    ])  # fmt: skip
    assert {"norm.weight", "norm.bias", "layer_scale", "pos_embed", "mask_token"} <= {*others}
