"""Optimizers in float64 against their formulas, written out here, over a network with biases and norm parameters."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gengap_dist.config.sections import OptimConfig, RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies import Single
from gengap_dist.training.lr_schedule import scaled_lr
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


@pytest.mark.parametrize(
    ("rule", "lr", "betas", "eps", "decay"),  # at k = 4
    [
        ({"scaling": "adam_sqrt"}, 0.2, (0.6, 0.996), 0.5e-3, 0.01),
        ({"beta2_scaling": "half_life"}, 0.1, (0.9, 0.999**4), 1e-3, 0.01),
        ({"weight_decay_scaling": "linear"}, 0.1, (0.9, 0.999), 1e-3, 0.04),
        (
            {"scaling": "sqrt", "beta2_scaling": "half_life", "weight_decay_scaling": "linear"},
            0.2, (0.9, 0.999**4), 1e-3, 0.04,
        ),
    ],
)  # fmt: skip
def test_batch_rules_of_adam(rule, lr, betas, eps, decay):
    given = OptimConfig(name="adamw", lr=0.1, weight_decay=0.01, eps=1e-3, base_size=16, **rule)
    scaled = given.at_batch(64).model_copy(update={"lr": scaled_lr(given, 64)})
    agree(scaled, lambda w, g, memory, step: w * (1 - lr * decay) - lr * adam(g, memory, step, eps, betas))


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


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb", "muon"])
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


class Embedded(nn.Module):
    """An embedding, hidden matrices (wide, tall, of attention), a convolution, a norm, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.wide, self.tall, self.norm = nn.Linear(4, 2), nn.Linear(2, 6), nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five quintic steps from the matrix divided by its norm, on its shorter side, in bfloat16 as torch's."""
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).double()


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_follows_its_formula(nesterov):
    """M = m M + (1 - m) g, O = its orthogonal factor, w -= lr sqrt(max(1, rows / columns)) O (Jordan et al. 2024).

    The products of the five steps are rounded to bfloat16 here, too; test_muon_steps_are_nearly_orthogonal says what
    they are for.
    """
    net = network()
    hidden = {net[0].weight}
    optimizer = build_optimizer(
        OptimConfig(name="muon", lr=0.1, adamw_lr=0.02, momentum=0.6, nesterov=nesterov, weight_decay=0.01), net
    )
    expected = [p.detach().clone() for p in net.parameters()]
    memories: list[dict] = [{} for _ in expected]
    for step in range(1, 6):
        for p, g in zip(net.parameters(), gradients([p.detach() for p in net.parameters()]), strict=True):
            p.grad = g
        optimizer.step()
        for number, p in enumerate(net.parameters()):
            w, memory = expected[number], memories[number]
            (g,) = gradients([w])
            if p in hidden:
                m = memory["m"] = 0.6 * memory.get("m", 0.0) + 0.4 * g
                o = newton_schulz(0.4 * g + 0.6 * m if nesterov else m)
                w = w * (1 - 0.1 * 0.01) - 0.1 * max(1, w.shape[0] / w.shape[1]) ** 0.5 * o
            else:
                w = w * (1 - 0.02 * 0.01) - 0.02 * adam(g, memory, step, 1e-8)
            expected[number] = w
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_muon_steps_are_nearly_orthogonal():
    layers = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    before = layers[0].weight.detach().clone()
    optimizer = build_optimizer(OptimConfig(name="muon", lr=1.0, momentum=0.0), layers)
    torch.manual_seed(0)
    for p in layers.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    values = torch.linalg.svdvals(layers[0].weight.detach() - before)
    assert 0.5 < values.min() < values.max() < 1.5  # those of the gradient differ by more


def test_what_muon_takes():
    model = Embedded()
    optimizer = build_optimizer(OptimConfig(name="muon", lr=0.1, adamw_lr=0.02), model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    hidden = [names[p] for p in optimizer.param_groups[0]["params"]]
    assert hidden == ["wide.weight", "tall.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert {names[p] for p in optimizer.param_groups[1]["params"]} == {*names.values()} - {*hidden}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_a_tied_output_layer_is_an_embedding():
    model = Embedded()
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.table.weight
    assert len(build_optimizer(OptimConfig(name="muon"), model).param_groups[0]["params"]) == 4


def test_a_table_that_is_also_the_output_layer():
    """As in many language models: the last matrix of the last block is then hidden, and a norm follows it."""
    model = nn.Module()
    model.tokens = nn.Parameter(torch.ones(9, 4))
    model.block, model.norm = nn.Linear(4, 4), nn.LayerNorm(4)
    (found,) = build_optimizer(OptimConfig(name="muon"), model).param_groups[0]["params"]
    assert found is model.block.weight


def test_muon_without_a_matrix():
    with pytest.raises(UsageError, match=r"optim.name \(muon\) is for the matrices between.*choose adamw"):
        build_optimizer(OptimConfig(name="muon"), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)))


# -- a user's own ------------------------------------------------------------------------------------------------------


def adagrad(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    head, rest = [*model.parameters()][-2:], [*model.parameters()][:-2]
    groups = [{"params": rest}, {"params": head, "lr": lr / 10}]
    return torch.optim.Adagrad(groups, lr=lr, weight_decay=weight_decay)


NOT_CALLABLE = 3


def failing(model: nn.Module) -> None:
    raise KeyError("head")


def nothing(model: nn.Module) -> None:
    torch.optim.Adagrad(model.parameters())


def strange(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(network().parameters())


def part(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad([next(model.parameters())])


def closing(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters())


def without_rate(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters())
    del optimizer.param_groups[0]["lr"]
    return optimizer


def test_an_own_optimizer_gets_the_settings_that_it_names_and_keeps_the_ratios_of_its_rates():
    config = RunConfig(optim=OptimConfig(name=f"{__name__}:adagrad", lr=0.5, weight_decay=0.1))
    strategy = Single(config, World())
    strategy.setup(network(), partial(build_optimizer, config.optim))
    assert [(g["lr"], g["weight_decay"]) for g in strategy.optimizer.param_groups] == [(0.5, 0.1), (0.05, 0.1)]
    strategy.set_rates(0.25, 0.9)
    assert [g["lr"] for g in strategy.optimizer.param_groups] == [0.25, 0.025]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", r"cannot be imported.*module.path:factory"),
        ("NOT_CALLABLE", "is not a function of the network: name a function"),
        ("failing", r"failed \(.*test_optimizer.py:\d+, KeyError: 'head'\): fix the function"),
        ("nothing", "returned a NoneType, needs a torch.optim.Optimizer: return the optimizer"),
        ("strange", "of parameters that the network does not have: build it from the network"),
        ("part", "without the parameter 0.bias: give it all parameters, or set requires_grad to False"),
        ("closing", "returned a LBFGS, whose step needs a closure: choose"),
        ("without_rate", "without a learning rate lr in each group: give it one"),
    ],
)
def test_what_is_wrong_with_an_own_optimizer(name, says):
    with pytest.raises(UsageError, match=rf"optim.name \({__name__}:{name}\) .*{says}"):
        build_optimizer(OptimConfig(name=f"{__name__}:{name}"), network())


class Counting(torch.optim.Optimizer):
    """Steps that shrink with a count in the group, with a number and a list of tensors in the state."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["number"] = 0.5 * state.get("number", 1.0)
                state["past"] = [p.grad.clone(), *state.get("past", [])][:2]
                p.sub_(sum(state["past"]), alpha=group["lr"] * (1 + state["number"]) / group["count"])


def test_an_own_optimizer_goes_on_from_a_checkpoint(tmp_path):
    """With what its groups and states hold, bit for bit, and nothing shared with the one that was saved."""
    config = RunConfig(optim=OptimConfig(name=f"{__name__}:Counting", lr=0.1))

    def begun(net: nn.Module) -> Single:
        strategy = Single(config, World())
        strategy.setup(net, partial(build_optimizer, config.optim))
        return strategy

    def steps(strategy: Single, num: int) -> None:
        for _ in range(num):
            parameters = [*strategy.model.parameters()]
            for p, g in zip(parameters, gradients([p.detach() for p in parameters]), strict=True):
                p.grad = g
            strategy.step()

    through, first = begun(network()), begun(network())
    steps(through, 6)
    steps(first, 3)
    saved = {"optimizer": first.optimizer_state(), "model": first.model.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    again = begun(network())
    again.model.load_state_dict(saved["model"])
    again.load_optimizer_state(saved["optimizer"])
    steps(first, 1)  # leaves the other alone
    steps(again, 3)
    assert all(map(torch.equal, through.model.parameters(), again.model.parameters()))
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["optimizer"][""]["param_groups"][0]["count"] == 3
