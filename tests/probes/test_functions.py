"""Non-linearities that are functions, written by hand or not: found where they end, and measured there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gengap_dist.errors import UsageError
from gengap_dist.probes import measure
from gengap_dist.probes.layers import select_layers

X = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Two linear layers, and a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function, self.first = function, nn.Linear(6, 8).double()
        self.second = nn.Linear(width, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def spectrum(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False) / len(matrix) ** 0.5


C = torch.tensor(0.8, dtype=torch.float64)


def _zero_below(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (F.relu, "relu"),
    "relu method": (lambda x: x.relu(), "relu"),
    "relu in place": (lambda x: x.relu_(), "relu"),
    "log sigmoid": (F.logsigmoid, "log_sigmoid"),
    "softsign": (F.softsign, "softsign"),
    "tanhshrink": (F.tanhshrink, "tanhshrink"),
    "hardshrink": (F.hardshrink, "hardshrink"),
    "softshrink": (F.softshrink, "softshrink"),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.0), "threshold"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
    "sin": (lambda x: torch.sin(30 * x), "sin"),
    "abs": (torch.abs, "abs"),
    "square": (torch.square, "square"),
    "times itself": (lambda x: x * x, "mul"),
    "power": (lambda x: x**2, "pow"),
    "exp": (torch.exp, "exp"),
    "clamp": (lambda x: x.clamp(min=0), "clamp"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(())), "maximum"),
    "maximum of zeros": (lambda x: torch.maximum(x, torch.zeros_like(x)), "maximum"),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), "gt"),
    "mask": (lambda x: x * (x > 0), "gt"),
    "float mask": (lambda x: x * (x > 0).double(), "gt"),
    "gelu by hand": (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "erf"),
    "gelu by hand, halved at the end": (lambda x: x * (1 + torch.erf(x / 2**0.5)) * 0.5, "erf"),
    "gelu by tanh": (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x**3))), "tanh"),
    "swish": (lambda x: x * torch.sigmoid(x), "sigmoid"),
    "hard swish": (lambda x: x * F.relu6(x + 3) / 6, "relu6"),
    "softsign by hand": (lambda x: x / (1 + x.abs()), "abs"),
    "masked fill": (lambda x: x.masked_fill(x < 0, 0.0), "lt"),
    "indexed": (lambda x: _zero_below(x), "lt"),
    "expit": (torch.special.expit, "expit"),
    "gelu by special functions": (lambda x: x * torch.special.ndtr(x), "ndtr"),
    "softplus by hand": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), "logaddexp"),
    "a power of two": (lambda x: 2**x, "rpow"),
    "straight through": (lambda x: x + (torch.sign(x) - x).detach(), "sign"),
    "detached mask": (lambda x: x * (x.detach() > 0).double(), "gt"),
    "mask of data": (lambda x: x * (x.data > 0), "gt"),
    "gelu by tanh, with tensors": (lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.045 * x**3))), "tanh"),
    "leaky by a tensor": (lambda x: torch.where(x > 0, x, C * x), "gt"),
    "swish by lerp": (lambda x: torch.lerp(torch.zeros_like(x), x, torch.sigmoid(x)), "sigmoid"),
    "snake": (lambda x: x + torch.sin(x) ** 2, "pow"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_found_and_measured_at_its_end(name):
    function, expected = FUNCTIONS[name]
    model = Between(function)
    (found,) = measure(model, X.split(4), centred=[False])
    assert found.layer == expected
    true = spectrum(function(model.first(X)))
    assert np.abs(found.singular_values.numpy() - true).max() <= 1e-7 * true[0]


def test_maxout():
    model = Between(lambda x: x.view(-1, 4, 2).amax(-1), width=4)
    (found,) = measure(model, [X], centred=[False])
    true = spectrum(model.first(X).view(-1, 4, 2).amax(-1))
    assert np.abs(found.singular_values.numpy() - true).max() <= 1e-7 * true[0]


def test_maxout_of_two_layers():
    class Maxout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 5).double(), nn.Linear(6, 5).double(), nn.Linear(5, 2).double()

        def forward(self, x):
            return self.head(torch.max(self.a(x), self.b(x)))

    model = Maxout()
    (found,) = measure(model, [X], centred=[False])
    assert found.layer == "max"
    assert np.abs(found.singular_values.numpy() - spectrum(torch.max(model.a(X), model.b(X)))).max() <= 1e-6


@pytest.mark.parametrize(
    "module", [nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Softmax, nn.Sigmoid], ids=str
)
def test_modules_of_torch(module):
    settings = {"dim": -1} if module is nn.Softmax else {}
    model = nn.Sequential(nn.Linear(6, 8), module(**settings), nn.Linear(8, 2)).double()
    (found,) = measure(model, [X], centred=[False])
    assert found.layer == "1"


def test_every_activation_module_of_torch_is_found():
    """All that torch.nn.modules.activation has, but attention, which is no function of one tensor."""
    from torch.nn.modules import activation

    left = {"MultiheadAttention", "Softmax2d", "GLU", "Module"}
    settings: dict[str, Any] = {"Threshold": (0.1, 0.0), "Softmax": (-1,), "LogSoftmax": None, "Softmin": None}
    for name in [*activation.__all__]:
        if name in left or settings.get(name, ()) is None:
            continue
        model = nn.Sequential(nn.Linear(6, 8), getattr(nn, name)(*settings.get(name, ())), nn.Linear(8, 2))
        layers = select_layers(model.eval(), torch.randn(2, 6), ["auto"])
        assert [layer.name for layer in layers] == ["1"], name


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks(kind, batch_first):
    """The outputs at all times; samples are the rows of `pool` and `flatten`, wherever the network has them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = kind(6, 5, batch_first=batch_first).double(), nn.Linear(5, 2).double()

        def steps(self, x):
            return self.rnn(x if batch_first else x.transpose(0, 1))[0]

        def forward(self, x):
            return self.head(self.steps(x).mean(1 if batch_first else 0))

    model, x = Net(), torch.randn(9, 7, 6, dtype=torch.float64)
    found = {s.view: s for s in measure(model, x.split(4), views=["token", "pool", "flatten"], centred=[False])}
    steps = model.steps(x) if batch_first else model.steps(x).transpose(0, 1)
    true = {"token": steps.reshape(-1, 5), "pool": steps.mean(1), "flatten": steps.flatten(1)}
    assert {s.layer for s in found.values()} == {"rnn"}
    for view, matrix in true.items():
        assert np.abs(found[view].singular_values.numpy() - spectrum(matrix)).max() <= 1e-7, view


class Attention(nn.Module):
    """By hand; its softmax weights rows of another tensor, and is no activation of units."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.act = nn.Linear(6, 18).double(), nn.Linear(6, 6).double(), nn.ReLU()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = F.dropout((q @ k.transpose(1, 2) / 6**0.5).softmax(-1), 0.1, self.training)
        return self.act(self.out(weights @ v))


class Normalized(nn.Module):
    """Norms by hand: root mean square, length, softmax; they are no activations of units either."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(6, 6).double(), nn.ReLU()

    def forward(self, x):
        x = self.first(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        powers = torch.exp(x)
        return self.act(powers / powers.sum(-1, keepdim=True))


@pytest.mark.parametrize("network", [Attention, Normalized])
def test_attention_and_norms_are_no_layers(network):
    x = torch.randn(8, 4, 6, dtype=torch.float64) if network is Attention else X
    assert {s.layer for s in measure(network(), [x])} == {"act"}


class Tokens(nn.Module):
    """Of token numbers: masks and positions are computed from integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(12, 6).double(), nn.Linear(6, 6).double()

    def forward(self, ids):
        mask = (ids > 0).double()
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return (F.relu(self.linear(self.embedding(ids))) * weights[..., None]).sum(1)


def test_masks_of_token_numbers_are_no_layers():
    ids = torch.randint(12, (9, 5), generator=torch.Generator().manual_seed(0))
    model = Tokens()
    found = measure(model, [ids], views=["token"], centred=[False])
    assert [s.layer for s in found] == ["relu"]
    true = spectrum(model.linear(model.embedding(ids)).relu().reshape(-1, 6))
    assert np.abs(found[0].singular_values.numpy() - true).max() <= 1e-7


class Listed(nn.Module):
    """Modules in a plain list, which torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 6).double(), nn.ReLU(), nn.Linear(6, 6).double(), nn.ReLU()]
        self.head = nn.Linear(6, 2).double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_modules_in_a_plain_list():
    model = Listed()
    found = measure(model, X.split(5), centred=[False])
    assert [s.layer for s in found] == ["relu", "relu#2"]
    x = X
    for s, (linear, act) in zip(found, [model.layers[:2], model.layers[2:]], strict=True):
        x = act(linear(x))
        assert np.abs(s.singular_values.numpy() - spectrum(x)).max() <= 1e-7


class Routed(nn.Module):
    """Results are written into a tensor that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x):
        out, order = torch.zeros_like(x), torch.arange(len(x))
        out[order] = self.second(F.relu(self.first(x))[order])
        return self.head(F.relu(out))


def test_what_follows_a_preallocated_tensor_is_found():
    model = Routed()
    found = measure(model, X.split(5), centred=[False])
    assert [s.layer for s in found] == ["relu", "relu#2"]
    first = model.first(X).relu()
    for s, matrix in zip(found, (first, model.second(first).relu()), strict=True):
        assert np.abs(s.singular_values.numpy() - spectrum(matrix)).max() <= 1e-7


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.hstack([x[:, :3], x[:, 3:]]),
        lambda x: torch.concatenate([x[:, :3], x[:, 3:]], 1),
        lambda x: torch.einsum("nd,kd->nk", [x, torch.eye(6, dtype=x.dtype)]),
        lambda x: torch.mul(x, 1.0, out=torch.empty_like(x)),
    ],
)
def test_what_follows_a_function_of_a_list_is_found(join):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 2).double()

        def forward(self, x):
            return self.head(torch.tanh(self.linear(join(x))))

    assert [s.layer for s in measure(Joined(), [X], centred=[False])] == ["tanh"]


class Temporal(nn.Module):
    """Sequences [N, C, L], in which a slice, a split, a pad or a join comes between a convolution and its function."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.conv, self.between, self.width = nn.Conv1d(3, width, 3, padding=2).double(), between, width

    def forward(self, x):
        return F.relu(self.between(self.conv(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x[:, :, :-2],
        lambda x: x.chunk(2, 1)[1],
        lambda x: F.pad(x, (1, 1)),
        lambda x: torch.cat([x, x], 1),
        lambda x: F.glu(x, 1),
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: x.transpose(1, 2).transpose(1, 2),
    ],
)
def test_units_are_followed_through_changes_of_shape(between):
    model, x = Temporal(between), torch.randn(9, 3, 10, dtype=torch.float64)
    found = {s.layer: s for s in measure(model, x.split(4), views=["channel"], centred=[False])}
    a = F.relu(between(model.conv(x)))
    true = spectrum(a.permute(0, 2, 1).reshape(-1, a.shape[1]))
    assert found["relu"].num_units == a.shape[1]
    assert np.abs(found["relu"].singular_values.numpy() - true).max() <= 1e-7 * true[0]


@pytest.mark.parametrize(
    "weight",
    [
        lambda a: a.reshape(-1, 4, 4),
        lambda a: a.masked_fill(a < 0, 0.0),
        lambda a: a / a.sum(-1, keepdim=True),
        lambda a: a.transpose(1, 2),
    ],
)
def test_attention_with_something_between(weight):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(6, 6).double(), nn.ReLU()

        def forward(self, x):
            h = self.linear(x)
            return self.act(weight(torch.softmax(h @ h.transpose(1, 2), -1)) @ x)

    assert {s.layer for s in measure(Attends(), [torch.randn(8, 4, 6, dtype=torch.float64)])} == {"act"}


def test_sums_with_noise_or_a_position_are_no_residual_blocks():
    class Adds(nn.Module):
        def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.other = other

        def forward(self, x):
            return x + self.other(x)

    table = nn.Parameter(torch.randn(1, 8))
    model = nn.Sequential(
        nn.Linear(6, 8), Adds(lambda x: 0.1 * torch.randn_like(x)), Adds(lambda x: table.expand(len(x), -1)), nn.Tanh()
    )
    assert [s.layer for s in measure(model, [X.float()], centred=[False])] == ["3"]


def test_the_length_of_a_row_is_no_layer_with_or_without_keepdim():
    model = Between(lambda x: x / x.pow(2).sum(1).sqrt().unsqueeze(1))
    with pytest.raises(UsageError, match="matches no layer"):
        measure(model, [X])


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(cell):
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(6, 5).double(), nn.Linear(5, 2).double()

        def forward(self, x):
            state = self.cell(x)
            return self.head(state[0] if isinstance(state, tuple) else state)

    model = Stepped()
    (found,) = measure(model, X.split(4), centred=[False])
    state = model.cell(X)
    true = spectrum(state[0] if isinstance(state, tuple) else state)
    assert np.abs(found.singular_values.numpy() - true).max() <= 1e-7


def test_pixels_in_whole_numbers_give_the_layers_that_real_ones_give():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8, bias=False))

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = normed, nn.Linear(8, 4)

        def forward(self, x):
            return F.relu(self.second(F.relu(self.first(x.float() / 255))))

    whole = torch.randint(0, 255, (9, 6), dtype=torch.uint8)
    for x in (whole, whole.float()):
        assert [s.layer for s in measure(Pixels(), [x], centred=[False])] == ["relu", "relu#2"]


# -- layers that do not run for every sample ---------------------------------------------------------------------------


class Early(nn.Module):
    """The second block runs only where the first number of the batch says so."""

    def __init__(self, width: int = 4000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).double()
        self.b = nn.Sequential(nn.Linear(6, width), nn.ReLU()).double()

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if self.runs(x) else x

    def runs(self, x):
        return self.taken

    taken = True


class Halves(Early):
    def forward(self, x):
        self.taken = bool(x[0, 0] > 0)
        return super().forward(x)


def halves(*, first: bool) -> list[Tensor]:
    """Two halves of 32 samples, of which one has a positive number at its beginning."""
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[32, 0] = (1.0, -1.0) if first else (-1.0, 1.0)
    return [*x.split(32)]


@pytest.mark.parametrize("width", [4, 4000])  # the Gram matrix of units, and that of rows
def test_a_layer_that_runs_for_some_samples_is_left_out(width):
    model = Halves(width)
    with pytest.warns(UserWarning, match=r"layer b.1 ran 0 time\(s\) in one pass and 1 in another.*it is left out"):
        found = measure(model, halves(first=True))
    assert {s.layer for s in found} == {"a.1"}
    true = spectrum(model.a(torch.cat(halves(first=True))))
    assert np.abs(found[0].singular_values.numpy() - true).max() <= 1e-7
    with pytest.raises(UsageError, match=r"layer b.1 ran 0 time\(s\).*leave it out of probe.layers"):
        measure(model, halves(first=True), layers=["b.1"])


def test_a_layer_that_does_not_run_for_the_traced_samples_is_named():
    with pytest.warns(UserWarning, match=r"b.0, b.1 did not run for the two traced samples and ran for others"):
        found = measure(Halves(), halves(first=False))
    assert {s.layer for s in found} == {"a.1"}


class Experts(nn.Module):
    """A mixture of experts: each gets the rows that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double() for _ in range(2)])

    def forward(self, x):
        x = self.stem(x)
        to_first = x[:, 0] > x[:, 1]
        out = torch.zeros_like(x)
        for chosen, expert in zip((to_first, ~to_first), self.experts, strict=True):
            out[chosen] = expert(x[chosen])
        return out


def test_experts_are_left_out_and_the_rest_is_measured():
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="left out|not measured"):
        found = measure(Experts(), x.split(32))
    assert {s.layer for s in found} == {"stem.1"}


def test_batch_norm_without_running_statistics_is_traced():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU()).double()
    (found,) = measure(model, [X], centred=[False])
    assert np.abs(found.singular_values.numpy() - spectrum(model(X))).max() <= 1e-7


class Counting(nn.Module):
    """Changes its buffers in eval mode, in place and by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double(), nn.Linear(8, 2).double()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.last = x.mean()
        return self.head(self.net(x))


def test_buffers_are_as_found():
    from gengap_dist.probes.neural_collapse import nc1

    model = Counting()
    last = model.last
    measure(model, X.split(4))
    nc1(model, [(X, torch.arange(11) % 2)])
    assert model.passes == 0
    assert model.last is last


DEPRECATED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


@DEPRECATED
def test_torchscript_is_refused_in_one_sentence():
    model = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double())
    with pytest.raises(UsageError, match="Sequential is a TorchScript module, in which no layer can be seen"):
        measure(model, [X])


@DEPRECATED
def test_a_part_in_torchscript_is_one_module():
    part = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    model = nn.Sequential(part, nn.Linear(8, 4), nn.ReLU()).double()
    with pytest.warns(UserWarning, match=r"1 layer\(s\) of Sequential are not measured.*: 0 \(TorchScript\)"):
        assert [s.layer for s in measure(model, [X], centred=[False])] == ["2"]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: F.relu(x.view(-1, 12)),  # pairs of rows
        lambda x: F.relu(x[::2]),
    ],
)
def test_rows_of_several_samples_are_left_out(step):
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()

        def forward(self, x):
            return step(self.stem(x)).sum()

    with pytest.warns(UserWarning, match="not measured"):
        assert [s.layer for s in measure(Paired(), [X[:10]], centred=[False])] == ["stem.1"]


class InPlace(nn.Module):
    """Normalises its inputs where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 300).double()

    def forward(self, x):
        return F.relu(self.first(x.sub_(1).div_(2)))


def test_inputs_are_as_found():
    x, model = X.clone(), InPlace()
    few = measure(model, [x], centred=[False], memory_mib=1)
    assert torch.equal(x, X)
    assert np.abs(few[0].singular_values.numpy() - spectrum(model(X.clone()))).max() <= 1e-7


class Merged(nn.Linear):
    """Adds to its weight when it leaves training, as low-rank adapters do."""

    merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return super().train(mode)


def test_a_module_that_acts_when_its_mode_changes():
    model = nn.Sequential(Merged(6, 4).double(), nn.ReLU()).train()
    before = model[0].weight.clone()
    measure(model, [X])
    assert not model[0].merged
    assert torch.allclose(model[0].weight, before, atol=1e-12)


class Growing(nn.Module):
    """Makes a buffer in its first pass, fills one, and changes one behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.register_buffer("mask", None)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(4)
        if not hasattr(self, "cos"):
            self.register_buffer("cos", torch.ones(4))
        self.count.data.add_(1)
        return F.relu(self.linear(x) * self.mask)


def test_buffers_that_a_pass_makes_are_gone():
    model = Growing()
    before = [*model.state_dict()]
    measure(model, [X])
    assert [*model.state_dict()] == before
    assert (model.mask, model.count) == (None, 0)


def test_networks_made_in_inference_mode_and_lazy_ones():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()).double()
    assert [s.layer for s in measure(model, [X], centred=[False])] == ["2"]
    with pytest.raises(UsageError, match="parameters whose shapes are not known yet"):
        measure(nn.Sequential(nn.LazyLinear(6), nn.ReLU()), [X])


def test_sparse_inputs_are_refused_in_a_sentence():
    with pytest.raises(UsageError, match="probe batches are sparse tensors"):
        measure(nn.Sequential(nn.Linear(6, 6), nn.ReLU()).double(), [X.relu().to_sparse()])
