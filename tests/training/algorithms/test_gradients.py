"""Directions of a step against what they are defined as, in float64."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies import Single
from gengap_dist.training.algorithms.gradient_penalty import gradient_penalty
from gengap_dist.training.algorithms.sam import sam
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import Objective, StepBatch, accumulate
from gengap_dist.training.tasks import Classification
from tests.conftest import config

NUM, CLASSES = 24, 5
SPEC = DataSpec((1, 6, 6), (CLASSES,), num_classes=CLASSES)
TASK = Classification(SPEC)


class Given:
    """Batches of one data set, as `BatchLoader` hands them out."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __call__(self, indices, epoch):
        return self.images[indices], self.labels[indices]


@pytest.fixture
def problem():
    """A small convolutional network, all of whose samples are one global batch in three micro-batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    ).double()
    strategy = Single(config(), World())
    strategy.setup(net, partial(build_optimizer, config().optim))
    given = Given(torch.randn(NUM, 1, 6, 6).double(), torch.randint(CLASSES, (NUM,)))
    work = StepBatch(torch.arange(NUM), 0, [Span(0, 8), Span(8, 16), Span(16, 24)])
    return SimpleNamespace(net=net, strategy=strategy, given=given, work=work, parameters=list(net.parameters()))


def gradients(problem):
    return torch.cat([p.grad.flatten() for p in problem.parameters])


def gradient_of(loss, problem, **options):
    return torch.autograd.grad(loss, problem.parameters, **options)


def mean_loss(problem, at=slice(None)):
    return cross_entropy(problem.net(problem.given.images[at]), problem.given.labels[at])


def test_sam_is_the_gradient_one_step_up(problem):
    rho = 0.3
    before = [p.detach().clone() for p in problem.parameters]
    g = gradient_of(mean_loss(problem), problem)
    norm = torch.sqrt(sum(x.square().sum() for x in g))
    sums, told = sam(rho)(problem.strategy, problem.given, problem.work, Objective(TASK))
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))  # bit for bit
    assert float(sums[0]) / NUM == pytest.approx(mean_loss(problem).item())  # the loss at the weights
    assert float(told) == pytest.approx(norm.item())
    with torch.no_grad():
        for p, x in zip(problem.parameters, g, strict=True):
            p += rho * x / norm
    want = torch.cat([x.flatten() for x in gradient_of(mean_loss(problem), problem)])
    torch.testing.assert_close(gradients(problem), want, rtol=1e-9, atol=1e-12)


def test_the_gradient_penalty_is_a_hessian_product(problem):
    """c/2 mean_b |g_b|^2, differentiated by autograd twice; the forward difference is good to a few percent of it."""
    c = 0.7
    sums, _ = gradient_penalty(c)(problem.strategy, problem.given, problem.work, Objective(TASK))
    got = gradients(problem)
    plain = torch.cat([x.flatten() for x in gradient_of(mean_loss(problem), problem)])
    penalty = sum(
        sum(x.square().sum() for x in gradient_of(mean_loss(problem, slice(*span)), problem, create_graph=True)) / 3
        for span in problem.work.spans
    )
    want = torch.cat([x.flatten() for x in gradient_of(c / 2 * penalty, problem)])
    assert ((got - plain - want).norm() / want.norm()).item() < 0.02
    assert (want.norm() / plain.norm()).item() > 0.1  # it matters at all
    assert float(sums[0]) / NUM == pytest.approx(mean_loss(problem).item())


def test_the_forward_difference_to_the_last_digit(problem):
    """Written out: g_b at w + 0.01 g_b / |g_b|."""
    c = 0.7
    want = 0
    for span in problem.work.spans:
        g = torch.cat([x.flatten() for x in gradient_of(mean_loss(problem, slice(*span)), problem)])
        step = 0.01 / g.norm()
        moved = torch.cat([p.detach().flatten() for p in problem.parameters]) + step * g
        there = [
            x.view_as(p)
            for x, p in zip(moved.split([p.numel() for p in problem.parameters]), problem.parameters, strict=True)
        ]
        named = dict(zip(dict(problem.net.named_parameters()), (x.requires_grad_() for x in there), strict=True))
        logits = torch.func.functional_call(problem.net, named, problem.given.images[slice(*span)])
        ahead = torch.autograd.grad(cross_entropy(logits, problem.given.labels[slice(*span)]), list(named.values()))
        want = want + (g + c * (torch.cat([x.flatten() for x in ahead]) - g) / step) / 3
    gradient_penalty(c)(problem.strategy, problem.given, problem.work, Objective(TASK))
    torch.testing.assert_close(gradients(problem), want, rtol=1e-9, atol=1e-11)


def test_the_gradient_penalty_of_a_parameter_that_nothing_uses(problem):
    problem.net.spare = nn.Linear(2, 2).double()
    problem.net.forward = lambda images: problem.net[:6](images)
    gradient_penalty(0.7)(problem.strategy, problem.given, problem.work, Objective(TASK))
    with_spare = gradients(problem)
    assert not problem.net.spare.weight.grad.any()
    del problem.net.spare
    problem.strategy.optimizer.zero_grad()
    gradient_penalty(0.7)(problem.strategy, problem.given, problem.work, Objective(TASK))
    assert torch.equal(with_spare, gradients(problem))


def test_label_smoothing(problem):
    objective = Objective(Classification(SPEC, 0.2))
    accumulate(problem.strategy, problem.given, problem.work, objective)
    logs = problem.net(problem.given.images).log_softmax(1)
    targets = torch.full_like(logs, 0.2 / CLASSES)
    targets[torch.arange(NUM), problem.given.labels] += 0.8
    want = gradient_of(-(targets * logs).sum(1).mean(), problem)
    torch.testing.assert_close(gradients(problem), torch.cat([x.flatten() for x in want]), rtol=1e-9, atol=1e-12)
