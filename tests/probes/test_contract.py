"""What every probe promises: nobody notices it was there, and it finds the same on any number of ranks, every time."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import LayerSpectrum, measure
from gengap_dist.probes.hessian import hessian_eigenvalues, hessian_trace, keskar_sharpness
from gengap_dist.probes.neural_collapse import nc1
from gengap_dist.probes.weights import distance_from_init, flat_parameters, weight_spectra
from tests.ranks import forked_ranks, on_ranks

SIZES = (6, 5, 9, 3, 2)
Batches = list[tuple[torch.Tensor, torch.Tensor]]

LOSS = nn.CrossEntropyLoss(reduction="sum")


class Probe(NamedTuple):
    call: Callable[[nn.Module, Batches, World], object]
    runs_forward: bool = True


def spectra(found: Iterable[LayerSpectrum]) -> dict:
    return {s.key: [*s.singular_values.tolist(), s.floor, s.num_samples, s.num_units, s.dead_units] for s in found}


def rank_loss(**options: object) -> Probe:
    return Probe(lambda model, batches, world: spectra(measure(model, [x for x, _ in batches], world=world, **options)))


PROBES = {
    "gram": rank_loss(),
    "tsqr": rank_loss(method="tsqr"),
    "flatten": rank_loss(views=["flatten"], memory_mib=1),
    "weights": Probe(lambda m, b, w: spectra(weight_spectra(m, world=w)), runs_forward=False),
    "distance": Probe(lambda m, b, w: distance_from_init(m, torch.ones_like(flat_parameters(m))), runs_forward=False),
    "nc1": Probe(lambda m, b, w: nc1(m, b, world=w)),
    "eigenvalues": Probe(lambda m, b, w: hessian_eigenvalues(m, b, LOSS, world=w, num=2, max_steps=3, tolerance=9.0)),
    "trace": Probe(lambda m, b, w: hessian_trace(m, b, LOSS, world=w, num_vectors=2)),
    "keskar": Probe(lambda m, b, w: keskar_sharpness(m, b, LOSS, world=w, epsilon=0.02, steps=3)),
}
FORWARD = [name for name, probe in PROBES.items() if probe.runs_forward]


def numbers(found: object) -> dict[str, np.ndarray]:
    """What a probe found, as named vectors."""
    named = found if isinstance(found, dict) else {"": found}
    return {name: np.atleast_1d(np.array(value, dtype=np.float64)) for name, value in named.items()}


def same(found: object, other: object) -> bool:
    """To the last bit."""
    a, b = numbers(found), numbers(other)
    return [*a] == [*b] and all(a[name].tobytes() == b[name].tobytes() for name in a)


class OutOfOrder(Exception):
    pass


class Fuse(nn.Module):
    """Lets everything through, but not the pass number `blows_at`; keeps what the switches were in the last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = self.blows_at = 0
        self.seen: list[object] = []

    def forward(self, x):
        self.passes += 1
        self.seen = precisions()
        if self.passes == self.blows_at:
            raise OutOfOrder
        return x


class Fussy(nn.Module):
    """Everything a probe could disturb: a unit used twice, batch norm in both modes, dropout, noise, a frozen layer."""

    def __init__(self, *, noisy: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3).requires_grad_(False)
        self.unit = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fuse, self.noisy = Fuse(), noisy
        self.frozen_norm = nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.train()
        self.frozen_norm.eval()

    def forward(self, x):
        x = self.stem(x)
        if self.noisy:
            x = x + 0.1 * torch.rand_like(x)
        x = self.unit(self.fuse(self.unit(x)))
        return self.head(self.drop(self.frozen_norm(x).mean((2, 3))))


def setting(dtype: torch.dtype, *, noisy: bool = True) -> tuple[Fussy, Batches]:
    torch.manual_seed(0)
    model = Fussy(noisy=noisy).to(dtype)
    images, labels = torch.randn(sum(SIZES), 1, 8, 8).to(dtype), torch.arange(sum(SIZES)) % 3
    batches = list(zip(images.split(SIZES), labels.split(SIZES), strict=True))
    model(batches[0][0]).square().sum().backward()  # gradients, running statistics
    with torch.no_grad():
        model.unit[0].weight[1] = 0.0  # a dead unit
    return model, batches


def hooked(model: nn.Module) -> list[str]:
    """The log that a user's hooks write to, one of every kind."""
    log: list[str] = []
    model.unit.register_forward_pre_hook(lambda *_: log.append("pre"))
    model.unit[2].register_forward_hook(lambda *_: log.append("forward"))
    model.head.register_full_backward_pre_hook(lambda *_: log.append("backward pre"))
    model.head.register_full_backward_hook(lambda *_: log.append("backward"))
    model.head.weight.register_hook(lambda _: log.append("tensor"))
    model.head.weight.register_post_accumulate_grad_hook(lambda _: log.append("accumulated"))
    return log


def in_training(model: nn.Module, batches: Batches, log: list[str]) -> list[str]:
    """Which hooks fire, and in which order."""
    log.clear()
    model(batches[0][0]).sum().backward()
    return log[:]


def prepared() -> tuple[Fussy, Batches, list[str], list[str]]:
    """The same network in the same state each time, with its log and what training writes into it."""
    model, batches = setting(torch.float32)
    log = hooked(model)
    return model, batches, log, in_training(model, batches, log)


MIXED = "the older interface has no word for what the newer one did"


def precisions() -> list[object]:
    """How exactly float32 is multiplied, by torch's newer interface and by its older one."""
    cuda, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    places = (torch.backends, cuda, cudnn, cudnn.conv, cudnn.rnn, mkldnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    out: list[object] = [place.fp32_precision for place in places]
    for read in (torch.get_float32_matmul_precision, lambda: cuda.allow_tf32, lambda: cudnn.allow_tf32):
        try:
            out.append(read())
        except RuntimeError:
            out.append(MIXED)
    return out


def state(model: nn.Module) -> dict[str, object]:
    """All that must be the same before and after, compared with ==: tensors as bytes and by identity."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = {
        (name, kind): [*registered.items()]
        for name, owner in [*model.named_modules(), *tensors.items(), ("global", global_hooks)]
        for kind in dir(owner)
        if "hooks" in kind and (registered := getattr(owner, kind)) and hasattr(registered, "items")
    }
    return {
        "modes": {name: m.training for name, m in model.named_modules()},
        "modules": {name: id(m) for name, m in model.named_modules()},
        "hooks": hooks,
        "tensors": {
            name: (id(t), t.data_ptr(), t._version, t.detach().numpy().tobytes()) for name, t in tensors.items()
        },
        "requires_grad": {name: (t.requires_grad, t.grad_fn) for name, t in tensors.items()},
        "gradients": {
            name: t.grad is not None and (id(t.grad), t.grad._version, t.grad.numpy().tobytes())
            for name, t in tensors.items()
        },
        "random numbers": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "precisions": precisions(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic),
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
    }


def compiles() -> bool:
    """Whether torch.compile still does something: the stance has been put back."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()  # the same function is not compiled many times
    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    return len(graphs) == 1


@pytest.fixture
def unusual() -> Iterator[None]:
    """Every switch away from its default, by torch's older interface."""
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, False, True
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


SURROUNDINGS = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", PROBES)
def test_everything_is_as_found(unusual, name, surroundings):
    twin, batches, *_ = prepared()
    elsewhere = PROBES[name].call(twin, batches, World())
    model, batches, log, fired = prepared()
    with SURROUNDINGS[surroundings]():
        before = state(model)
        found = PROBES[name].call(model, batches, World())
        after = state(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert same(found, elsewhere)
    assert compiles()
    assert in_training(model, batches, log) == fired


@pytest.mark.parametrize("blows_at", [1, 2, 3])  # for near-rank loss the first pass is that of one example
@pytest.mark.parametrize("name", FORWARD)
def test_everything_is_as_found_when_a_pass_fails(unusual, name, blows_at):
    twin, batches, *_ = prepared()
    elsewhere = PROBES[name].call(twin, batches, World())
    model, batches, log, fired = prepared()
    model.fuse.passes, model.fuse.blows_at = 0, blows_at
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = state(model)
        with pytest.raises((OutOfOrder, UsageError)) as raised:
            PROBES[name].call(model, batches, World())
        assert OutOfOrder in (raised.type, type(raised.value.__cause__))
        after = state(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert compiles()
    model.fuse.blows_at = 0
    assert same(PROBES[name].call(model, batches, World()), elsewhere)
    assert in_training(model, batches, log) == fired


@pytest.mark.parametrize("name", FORWARD)
def test_a_function_of_its_arguments(name):
    """Modes and gradients are none; the state of the random numbers is, for a network that draws some."""
    model, batches = setting(torch.float32)
    first = PROBES[name].call(model, batches, World())
    assert same(PROBES[name].call(model, batches, World()), first)
    model.eval().zero_grad()
    assert same(PROBES[name].call(model, batches, World()), first)
    torch.rand(1)
    assert not same(PROBES[name].call(model, batches, World()), first)


PRECISIONS = {  # how float32 was allowed to be less, and what undoes it
    "default": (torch.backends, "fp32_precision", "none", "none"),
    "cudnn.allow_tf32": (torch.backends.cudnn, "allow_tf32", True, True),
    "all tf32": (torch.backends, "fp32_precision", "tf32", "none"),
    "matmul tf32": (torch.backends.cuda.matmul, "fp32_precision", "tf32", "none"),
    "conv ieee": (torch.backends.cudnn.conv, "fp32_precision", "ieee", "tf32"),
    "cpu bf16": (torch.backends.mkldnn.matmul, "fp32_precision", "bf16", "none"),
}


def with_precisions(world: World) -> dict[str, tuple]:
    out = {}
    for how, (place, name, value, default) in PRECISIONS.items():
        setattr(place, name, value)
        model, batches = setting(torch.float32)
        before = precisions()
        found = {name: PROBES[name].call(model, batches, world) for name in ("gram", "nc1", "keskar")}
        out[how] = (found, before, model.fuse.seen, precisions())
        setattr(place, name, default)
    return out


@pytest.mark.processes
def test_products_are_exact_whichever_interface_had_allowed_less():
    with forked_ranks():
        (answers,) = on_ranks(1, with_precisions)
    for how, (found, before, inside, after) in answers.items():
        assert after == before, how
        assert set(inside[:9]) == {"ieee"}, how
        assert inside[9:] == ["highest", False, False] or MIXED in before, how
        assert all(same(found[name], answers["default"][0][name]) for name in found), how
    assert MIXED in answers["matmul tf32"][1]


def dealt(batches: Batches, world: World) -> dict[str, Batches]:
    """In turn, which is uneven; and in turn among all but the first rank, which has none."""
    others = batches[world.rank - 1 :: max(1, world.size - 1)] if world.rank else []
    return {"in turn": batches[world.rank :: world.size], "rank 0 is idle": others if world.size > 1 else batches}


def everything(world: World) -> dict:
    model, batches = setting(torch.float64, noisy=False)
    return {
        (name, how): numbers(probe.call(model, mine, world))
        for name, probe in PROBES.items()
        for how, mine in dealt(batches, world).items()
    }


@pytest.fixture(scope="module")
def on(crews) -> dict[int, list[dict]]:
    return {1: [everything(World())], 2: crews[2](everything), 3: crews[3](everything)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", PROBES)
def test_the_same_on_any_number_of_ranks(on, name, size):
    for (probe, how), alone in on[1][0].items():
        if probe != name:
            continue
        first = on[size][0][probe, how]
        assert all(same(other[probe, how], first) for other in on[size])  # ranks agree to the last bit
        assert [*first] == [*alone]
        for key, true in alone.items():
            assert np.isfinite(true).all()
            assert np.abs(first[key] - true).max() <= 1e-9 * np.abs(true).max(), (how, key)
