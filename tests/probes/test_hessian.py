"""Sharpness against explicit Hessians and all corners of the box; the same on any number of ranks, even idle ones."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend
from torch.nn.functional import cross_entropy

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import hessian as hessian_module
from gengap_dist.probes.hessian import MeanLoss, hessian_eigenvalues, hessian_trace, keskar_sharpness, lanczos
from gengap_dist.probes.weights import flat_parameters

SIZES = (7, 16, 1, 9, 4)  # blocks: uneven on 2 and on 3 ranks
Batches = list[tuple[torch.Tensor, torch.Tensor]]

LOSS = nn.CrossEntropyLoss(reduction="sum")


class Tanh(nn.Module):
    """Smooth, with batch norm, dropout, a frozen layer, and one weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm = nn.Linear(4, 5).requires_grad_(False), nn.BatchNorm1d(5)
        self.first, self.second, self.drop = nn.Linear(5, 5), nn.Linear(5, 5), nn.Dropout(0.5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)
        self.norm.running_mean = torch.randn(5)

    def forward(self, x):
        x = self.norm(self.frozen(x)).tanh()
        return self.head(self.drop(self.second(self.first(x).tanh()).tanh()))


def setting(dtype: torch.dtype) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    model = Tanh().to(dtype)
    images, labels = torch.randn(sum(SIZES), 4).to(dtype), torch.randint(3, (sum(SIZES),))
    return model, list(zip(images.split(SIZES), labels.split(SIZES), strict=True))


def corners() -> tuple[nn.Module, Batches]:
    """A convex loss over 6 parameters: its maximum over a box is in a corner."""
    torch.manual_seed(3)
    return nn.Linear(2, 3, bias=False).double(), [(torch.randn(11, 2).double(), torch.randint(3, (11,)))]


def dealt(batches: Batches, world: World) -> dict[str, Batches]:
    return {"dealt": batches[world.rank :: world.size], "few": batches if world.rank == world.size - 1 else []}


def refusal(call, *args, **options) -> str:
    try:
        call(*args, **options)
    except UsageError as error:
        return str(error)
    return "nothing was raised"


def everything(world: World) -> dict:
    out = {}
    for dtype, how in ((torch.float64, "dealt"), (torch.float64, "few"), (torch.float32, "dealt")):
        model, batches = setting(dtype)
        mine = dealt(batches, world)[how]
        out[dtype, how, "eigenvalues"] = hessian_eigenvalues(model, mine, LOSS, world=world)
        out[dtype, how, "trace"] = hessian_trace(model, mine, LOSS, world=world, num_vectors=5)
        out[dtype, how, "keskar"] = keskar_sharpness(model, mine, LOSS, world=world, epsilon=0.02, steps=5)
    model, batches = setting(torch.float64)
    mine = dealt(batches, world)["few"]
    out["bent"] = refusal(hessian_eigenvalues, Bent(), mine, LOSS, world=world)
    out["empty"] = refusal(keskar_sharpness, model, [], LOSS, world=world)
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.warns(UserWarning, match="not finite"):
        out["nan"] = (
            hessian_eigenvalues(model, mine, LOSS, world=world),
            keskar_sharpness(model, mine, LOSS, world=world),
        )
    return out


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * x.exp()


class Bent(nn.Module):
    """Has a first derivative only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3).double()

    def forward(self, x):
        return Once.apply(self.fc(x))


@pytest.fixture(scope="module")
def on(crews) -> dict[int, list[dict]]:
    return {size: crews[size](everything) for size in (1, 2, 3)}


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    """The slow way: one function of one vector, differentiated twice, entry by entry."""
    model, batches = setting(torch.float64)
    model.eval()
    images, labels = map(torch.cat, zip(*batches, strict=True))
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return cross_entropy(functional_call(model, weights, (images,)), labels)

    return torch.autograd.functional.hessian(loss, flat_parameters(model))


@pytest.mark.parametrize("size", [2, 3])
def test_sharding_law(on, size):
    alone = on[1][0]
    for found in on[size]:
        assert found.keys() == alone.keys()
        for key, value in found.items():
            if key[-1] in ("eigenvalues", "trace", "keskar"):
                # float32: rounding changes with what the process did before (alignment of memory)
                rtol = 1e-6 if torch.float32 in key else 1e-9
                assert np.allclose(value, alone[key], rtol=rtol, atol=1e-12), key
                assert value == on[size][0][key]
        assert np.isnan(np.hstack(found["nan"])).all()
        assert "no rank has any samples" in found["empty"]
        assert "Bent cannot be differentiated twice" in found["bent"]
    assert "marked @once_differentiable" in on[size][-1]["bent"]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_eigenvalues_of_the_explicit_hessian(hessian, dtype, error):
    true = torch.linalg.eigvalsh(hessian).flip(0)[:3].numpy()
    found = hessian_eigenvalues(*setting(dtype), LOSS)
    assert np.abs(found / true - 1).max() < error
    assert true[0] > 1.1 * true[1] > 1.1**2 * true[2]  # so that the right ones are there in the right order


def test_all_eigenvalues_when_asked_for_more_than_there_are(hessian):
    model, batches = setting(torch.float64)
    found = hessian_eigenvalues(model, batches, LOSS, num=500, max_steps=500)
    assert np.allclose(found, torch.linalg.eigvalsh(hessian).flip(0), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trace_of_the_explicit_hessian(hessian, dtype):
    trace, error = hessian_trace(*setting(dtype), LOSS, num_vectors=200)
    beside = hessian - hessian.diag().diag()
    assert abs(trace - float(hessian.trace())) < 4 * error
    assert error == pytest.approx((2 * float(beside.square().sum()) / 200) ** 0.5, rel=0.2)
    assert error < abs(trace) / 10


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_products_that_share_a_gradient(hessian, dtype, error):
    model, batches = setting(dtype)
    passes = []
    model.head.register_forward_hook(lambda *_: passes.append(1))
    loss = MeanLoss(model, batches, LOSS, World())
    vectors = torch.randn(5, len(hessian), dtype=torch.float64)
    products = loss.hessian_vector_products(vectors)
    assert len(passes) == len(batches)
    assert (products - vectors @ hessian).abs().max() <= error * (vectors @ hessian).abs().max()
    for vector, product in zip(vectors, products, strict=True):
        assert torch.equal(loss.hessian_vector_product(vector), product)


def test_products_in_groups_give_the_same_trace(monkeypatch):
    model, batches = setting(torch.float32)
    whole = hessian_trace(model, batches, LOSS, world=World())
    monkeypatch.setattr(hessian_module, "VECTOR_BYTES", 3 * 8 * len(flat_parameters(model)))
    seen = []
    groups = hessian_trace(model, batches, LOSS, world=World(), on_progress=lambda *at: seen.append(at))
    assert groups == pytest.approx(whole, rel=1e-12)
    assert seen == sorted(seen)
    assert seen[-1] == (16, 16)
    assert len(seen) == 6 * len(batches)


def test_trace_is_exact_where_the_hessian_is_diagonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 1), nn.ZeroPad1d((0, 1))).double()  # every image has a weight of its own
    images, labels = torch.arange(50), torch.randint(2, (50,))
    model.append(nn.Flatten())
    p = model[0].weight.detach().sigmoid()
    trace, error = hessian_trace(model, [(images[:9], labels[:9]), (images[9:], labels[9:])], LOSS, num_vectors=2)
    assert trace == pytest.approx(float((p * (1 - p)).mean()), rel=1e-12)
    assert error < 1e-15


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 3.0])
def test_keskar_is_the_worst_of_all_corners(epsilon):
    model, batches = corners()
    (images, labels), weight = batches[0], model.weight.detach()
    losses = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        there = weight + epsilon * (weight.abs() + 1) * torch.tensor(signs).view(3, 2)
        losses.append(float(cross_entropy(images @ there.T, labels)))
    start = float(cross_entropy(images @ weight.T, labels))
    found = keskar_sharpness(model, batches, LOSS, epsilon=epsilon)
    assert found == pytest.approx(100 * (max(losses) - start) / (1 + start), rel=1e-9)


class Wave(nn.Module):
    """One parameter, and a loss that is worst at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1]).double())

    def forward(self, x):
        return torch.stack([0 * x, self.w.cos().expand(len(x))], 1)


def test_keskar_is_never_negative_and_keeps_the_best():
    batches = [(torch.zeros(1).double(), torch.tensor([0]))]
    worst, start = (math.log(1 + math.exp(math.cos(w))) for w in (0.0, 0.1))
    true = 100 * (worst - start) / (1 + start)
    assert keskar_sharpness(Wave(), batches, LOSS, epsilon=1.5, steps=1) == 0.0  # far over the top
    assert 0.9 * true < keskar_sharpness(Wave(), batches, LOSS, epsilon=1.5, steps=200) <= true


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()
    loss = MeanLoss(model, [(torch.randn(5, 3, 8).double(), torch.tensor([0, 1, 2, 0, 1]))], LOSS, World())
    v = torch.randn_like(loss.weights_P)
    ahead, behind = (loss.gradient(loss.weights_P + h * v)[1] for h in (1e-5, -1e-5))
    assert torch.allclose(loss.hessian_vector_product(v), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)


def test_an_operation_without_second_derivative_is_named(monkeypatch):
    """With the math kernel taken from attention, torch itself has none."""
    monkeypatch.setattr(hessian_module, "SDPBackend", SimpleNamespace(MATH=SDPBackend.FLASH_ATTENTION))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 8)

        def forward(self, x):
            q = self.fc(x)[None, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]

    with pytest.raises(UsageError, match=r"Attention cannot be differentiated twice .*attention_for_cpu_backward"):
        hessian_trace(Attention(), setting(torch.float32)[1], LOSS)


def explicit(matrix: torch.Tensor, num: int, max_steps: int = 80) -> tuple[list[float], float, int]:
    generator = torch.Generator().manual_seed(1)
    products = []

    def product(v):
        products.append(1)
        return matrix @ v

    def draw():
        return torch.randn(len(matrix), generator=generator, dtype=torch.float64)

    return *lanczos(product, draw, World(), num, max_steps, 1e-8, 1e-12), len(products)


@pytest.mark.parametrize(
    ("values", "num", "steps"),
    [
        ([0.0] * 9, 3, 3),
        ([2.0] * 9, 3, 3),
        ([-1.0] * 9, 4, 4),
        ([7.0, 3.0] + [0.0] * 40, 3, 5),  # closes after 3; one step for each of two more subspaces
        ([5.0, 5.0, 5.0, 4.0, 4.0] + [0.0] * 40, 5, 10),  # subspaces of 3, 3, 2, 1 and 1 dimensions
        ([-50.0, 3.0, 2.0, 1.0], 2, 4),  # the largest, not those farthest from 0
        ([4.0], 3, 1),
        ([*np.linspace(1, 2, 300), 3.0, 4.0, -90.0], 2, None),
    ],
)
def test_lanczos_with_closed_subspaces(values, num, steps):
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    found, residual, taken = explicit(turn @ torch.tensor(values, dtype=torch.float64).diag() @ turn.T, num)
    assert np.allclose(found, sorted(values, reverse=True)[:num], atol=1e-6)
    assert residual <= 1e-8
    assert steps is None or taken == steps
    assert taken <= 80


def test_lanczos_says_how_far_it_is():
    values = torch.linspace(0, 1, 400).double()
    found, residual, taken = explicit(values.diag(), 3, max_steps=9)
    assert taken == 9
    assert 1e-3 < residual < 1
    assert all(min(abs(values - value)) <= residual for value in found)  # a residual is a bound


def test_too_few_steps_are_a_warning():
    model, batches = setting(torch.float64)
    with pytest.warns(UserWarning, match=r"residual of .* after 4 Lanczos steps, above 1.0e-05"):
        assert len(hessian_eigenvalues(model, batches, LOSS, max_steps=4)) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: hessian_eigenvalues(m, b, LOSS, max_steps=2), r"max_steps \(2\)"),
        (lambda m, b: hessian_trace(m, b, LOSS, num_vectors=1), r"num_vectors \(1\)"),
        (lambda m, b: keskar_sharpness(m.requires_grad_(False), b, LOSS), "no parameter with requires_grad"),
        (lambda m, b: hessian_trace(m, [], LOSS), "no rank has any samples"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call(*setting(torch.float64))


class Fussy(nn.Module):
    """Everything a probe could disturb: batch norm, dropout, random numbers, a count of passes, parts in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4).eval()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.register_buffer("passes", torch.zeros(1))
        self.fails_at = 0

    def forward(self, x):
        if self.fails_at and x.shape[0] == self.fails_at:
            raise RuntimeError("out of order")
        x = self.norm(self.conv(x)).tanh().mean((2, 3))
        return self.head(self.drop(x + 0.1 * torch.rand_like(x)))


class Counting(Fussy):
    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def left_as_found(call, model: Fussy) -> None:
    """Nothing of the model or of this process is other than before, whether the pass fails or not."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3) for n in (6, 5)]
    fired = []
    model.head.register_forward_hook(lambda *_: fired.append(1))
    model(batches[0][0]).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]

    def rest():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        switches = (
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
        )
        return modules, switches, torch.get_rng_state().tolist(), [p.requires_grad for p in model.parameters()]

    before = rest()
    first = call(model, batches)
    assert call(model, batches) == first  # though it draws random numbers: a function of its arguments
    assert len(fired) > 1
    model.fails_at = 5  # the second block
    with pytest.raises(RuntimeError, match="out of order"):
        call(model, batches)
    assert rest() == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("call", [hessian_eigenvalues, hessian_trace, keskar_sharpness])
def test_model_is_left_as_found(call):
    left_as_found(lambda model, batches: call(model, batches, LOSS), Counting())
