"""The noise scale: exact on expectations, right on a planted problem, and fed the right gradients by the loop."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist.config.sections import DataConfig, RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.distributed.batch_plan import BatchPlan, Span
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies import STRATEGIES
from gengap_dist.probes.noise_scale import DECAY, NoiseScale, unbiased_noise_estimates
from gengap_dist.training.step import Objective, StepBatch, train_step
from gengap_dist.training.step_metrics import StepMetrics
from gengap_dist.training.tasks import Classification


@pytest.mark.parametrize(
    ("small", "b", "big", "B", "squared", "trace"),
    [
        (5.0, 1, 3.0, 2, 1.0, 4.0),
        (2.0, 8, 2.0, 64, 2.0, 0.0),  # no noise
        (1.0, 10, 0.1, 100, 0.0, 10.0),  # nothing but noise
        (1.0, 1, 0.4, 2, -0.2, 1.2),  # an unbiased estimate of a square may be negative
        (4.0, 1.5, 2.0, 3.0, 0.0, 6.0),  # a harmonic mean is no whole number
    ],
)
def test_known_answers(small, b, big, B, squared, trace):
    assert unbiased_noise_estimates(small, b, big, B) == (
        pytest.approx(squared, abs=1e-12),
        pytest.approx(trace, abs=1e-12),
    )


@given(
    squared=st.floats(0, 1e6),
    trace=st.floats(0, 1e6),
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    more=st.integers(1, 1000),
)
def test_expectations_are_inverted(squared, trace, sizes, more):
    """E|G_b|^2 = |G|^2 + tr S / b, with a mean over small gradients of any sizes and their harmonic mean."""
    small_size = len(sizes) / sum(1 / b for b in sizes)
    small = sum(squared + trace / b for b in sizes) / len(sizes)
    big_size = max(sizes) + more
    found = unbiased_noise_estimates(small, small_size, squared + trace / big_size, big_size)
    assert found == (pytest.approx(squared, rel=1e-7, abs=1e-6 * (1 + trace)), pytest.approx(trace, rel=1e-7, abs=0.1))
    assert found[1] == pytest.approx(trace, rel=1e-9, abs=1e-9 * big_size * (1 + squared))


@pytest.mark.parametrize(("b", "B"), [(4, 4), (5, 4), (4.0000001, 4)])
def test_one_size_of_batch_is_refused(b, B):
    with pytest.raises(UsageError, match=rf"two batch sizes and has {b:g} and {B}: train on more ranks"):
        unbiased_noise_estimates(1.0, b, 1.0, B)
    scale = NoiseScale()
    with pytest.raises(UsageError):
        scale.add(1.0, b, 1.0, B)
    assert scale == NoiseScale()


def test_averages_of_numerator_and_denominator():
    scale = NoiseScale()
    assert scale.metrics() == {}
    squared, trace = np.array([1.0, 3.0, -1.0]), np.array([8.0, 2.0, 5.0])
    for g, t in zip(squared, trace, strict=True):
        scale.add(g + t / 2, 2, g + t / 10, 10)
    weights = DECAY ** np.array([2, 1, 0])
    found = scale.metrics()
    assert found["noise_scale/gradient_squared"] == pytest.approx(np.average(squared, weights=weights))
    assert found["noise_scale/trace_covariance"] == pytest.approx(np.average(trace, weights=weights))
    assert found["noise_scale"] == pytest.approx((weights @ trace) / (weights @ squared))


def test_no_scale_where_the_gradient_is_lost_in_noise():
    scale = NoiseScale()
    scale.add(1.0, 1, 0.4, 2)
    assert [*scale.metrics()] == ["noise_scale/gradient_squared", "noise_scale/trace_covariance"]


SIZES = {"equal": [16, 16, 16, 16], "unequal": [4, 12, 16, 32], "one of four": [16]}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lr", [0.0, 5e-3])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_planted_noise_scale(sizes, lr, seed):
    """SGD on a quadratic: a sample's gradient is H (w - w*) + noise of covariance S, both diagonal and uneven.

    tr S / |G|^2 is 50 at the start and, with a learning rate, about 100 at the end, on 64 samples a step: |G_B|^2 alone
    would be 1.8 to 2.2 times too large. Over seeds, the scale's standard deviation is 1 to 3 %.
    """
    rng = np.random.default_rng(seed)
    dims, global_size, planted = 500, 64, 50
    curvatures, deviations = np.geomspace(0.1, 1, dims), np.geomspace(0.3, 3, dims)
    w = rng.choice([-1.0, 1.0], dims) / curvatures  # w* = 0
    w *= (np.square(deviations).sum() / planted) ** 0.5 / np.linalg.norm(curvatures * w)
    scale, squares = NoiseScale(), []
    for _ in range(200):
        true = curvatures * w
        gradients = true + deviations * rng.normal(size=(global_size, dims))
        parts = np.split(gradients, np.cumsum(SIZES[sizes]))[: len(SIZES[sizes])]
        small = np.mean([np.square(part.mean(0)).sum() for part in parts])
        small_size = 1 / np.mean([1 / len(part) for part in parts])
        scale.add(small, small_size, np.square(gradients.mean(0)).sum(), global_size)
        squares.append(np.square(true).sum())
        w = w - lr * gradients.mean(0)
    found, trace = scale.metrics(), np.square(deviations).sum()
    squared = np.average(squares, weights=DECAY ** np.arange(len(squares))[::-1])
    assert found["noise_scale/gradient_squared"] == pytest.approx(squared, rel=0.1)
    assert found["noise_scale/trace_covariance"] == pytest.approx(trace, rel=0.05)
    assert found["noise_scale"] == pytest.approx(trace / squared, rel=0.1)
    assert squares[0] == pytest.approx(trace / planted)
    assert squares[0] > 1.5 * squares[-1] or not lr  # the optimizer does step


# strategy, ranks: global and micro sizes. 5 on 3 ranks in ones: one rank has one micro-batch, the others two.
CASES = {
    ("single", 1): [(24, 7), (24, 23), (24, 24), (1, 1)],
    ("ddp", 2): [(24, 100), (25, 100), (24, 5), (3, 1), (1, 1)],
    ("ddp", 3): [(24, 100), (25, 3), (5, 1), (2, 1), (1, 1)],
}


def network() -> nn.Module:
    """Two of DDP's buckets: the first is full at 1 MiB."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(1024, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh())
    return body.append(nn.Linear(400, 10)).double()


def energy(model: nn.Module, batches: BatchLoader, indices: torch.Tensor, span: Span) -> float:
    """|G_b|^2 of the mean loss over `span`, by autograd."""
    images, labels = batches(indices[span.start : span.stop], 0)
    loss = cross_entropy(model(images), labels)
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, [*model.parameters()]))


def expected(model: nn.Module, batches: BatchLoader, indices: torch.Tensor, plan: BatchPlan) -> list[float]:
    """The slow way, and the global gradient's square."""
    first = [plan.micro_batches(rank)[0] for rank in range(plan.world_size)]
    first = [span for span in first if 0 < span.size < len(indices)]
    sums = [
        sum(energy(model, batches, indices, span) for span in first),
        sum(1 / span.size for span in first),
        float(len(first)),
    ]
    return [*sums, energy(model, batches, indices, Span(0, len(indices)))]


def steps(world: World, name: str) -> list[tuple[int, int, bool, list[float], list[float]]]:
    """Found and expected in every case over three steps; nobody watches in the second."""
    splits = datasets.load(DataConfig())
    batches = BatchLoader(splits.train, Preprocess(splits.pixels, world.device, torch.float64), DataConfig(), 0)
    out = []
    for global_size, micro_size in CASES[name, world.size]:
        model = network()
        strategy = STRATEGIES[name](RunConfig(), world)
        strategy.setup(model, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        plan = BatchPlan(global_size, world.size, micro_size)
        for step, watching in enumerate((True, False, True)):
            indices = torch.arange(global_size) * 7 + 200 * step
            true = expected(copy.deepcopy(model), batches, indices, plan)
            strategy.track_local_grad_norm = watching
            step_batch = StepBatch(indices, 0, plan.micro_batches(world.rank))
            sums, norm = train_step(strategy, batches, step_batch, Objective(Classification(splits.spec)))
            totals = StepMetrics(*world.all_reduce(torch.stack(sums)).tolist())
            local = [totals.local_squared_norm, totals.local_inverse_size, totals.num_local_norms]
            found = [*local, float(norm) ** 2]
            out.append((global_size, micro_size, watching, found, true))
    return out


@pytest.mark.parametrize(("name", "size"), [*CASES])
def test_the_loop_sums_the_right_gradients(crews, name, size):
    answers = crews[size](steps, name) if size > 1 else [steps(World(), name)]
    for answer in answers:
        assert len(answer) == 3 * len(CASES[name, size])
        for global_size, micro_size, watching, found, true in answer:
            where = (global_size, micro_size, watching)
            assert found[3] == pytest.approx(true[3], rel=1e-12), where
            assert found[:3] == (pytest.approx(true[:3], rel=1e-12) if watching else [0.0] * 3), where
    counts = {(case[0], case[1]): case[3][2] for case in answers[0]}
    nothing = {("single", 1): [(24, 24), (1, 1)]}.get((name, size), [(1, 1)])  # the whole batch in one micro-batch
    assert {case for case, count in counts.items() if not count} == {*nothing}
    assert counts.get((2, 1), 2) == counts.get((3, 1), 2) == 2.0
