"""Interventions on the rank of activations against what they are defined as, in float64."""

import shutil
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist import models
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies import Single
from gengap_dist.probes.activations import capture_activations
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.algorithms import rank_penalty
from gengap_dist.training.algorithms.rank_penalty import MEASURES, RankPenalty, covariance_of, pull_of
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import Objective, StepBatch, accumulate
from gengap_dist.training.tasks import Classification
from tests.conftest import config, cut_after, train, weights

NUM, CLASSES = 60, 5
SPEC = DataSpec((1, 6, 6), (CLASSES,), num_classes=CLASSES)
TASK = Classification(SPEC)
ONE = torch.ones((), dtype=torch.float64)


class Given:
    """Batches of one data set, as `BatchLoader` hands them out; remembers which images the penalty takes."""

    def __init__(self, images, labels):
        self.images, self.samples, self.drawn = images, labels, []

    def __call__(self, indices, epoch):
        return self.images[indices], self.samples[indices]

    def plain(self, indices):
        self.drawn.append(indices)
        return self.images[indices]


def made(dtype=torch.float64, **settings):
    """A small convolutional network whose first 24 samples are a batch in two micro-batches, and its settings."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    ).to(dtype)
    run = config(**settings)
    strategy = Single(run, World())
    strategy.setup(net, partial(build_optimizer, run.optim))
    given = Given(torch.randn(NUM, 1, 6, 6).to(dtype), torch.randint(CLASSES, (NUM,)))
    batch = StepBatch(torch.arange(24), 0, [Span(0, 10), Span(10, 24)], (3, 7))
    return SimpleNamespace(net=net, strategy=strategy, given=given, batch=batch, run=run)


def penalised(strength, measure="logdet", images=40, **settings):
    return {
        "algorithm__rank_penalty": strength,
        "algorithm__rank_measure": measure,
        "algorithm__rank_images": images,
    } | settings


def gradient(problem, objective):
    """Of a step's objective, and the value of its penalty."""
    problem.strategy.optimizer.zero_grad()
    sums = accumulate(problem.strategy, problem.given, problem.batch, objective)
    return torch.cat([p.grad.flatten() for p in problem.net.parameters()]), float(sums.penalty)


def activations(net, images):
    """Rows of the two layers that `auto` finds: of a convolution by channel, and of a linear layer."""
    first = torch.tanh(net[0](images))
    return first.permute(0, 2, 3, 1).reshape(-1, 3), torch.tanh(net[3](first.flatten(1)))


def covariances(net, images):
    return [torch.cov(rows.T, correction=0) for rows in activations(net, images)]


def brute_force(problem, measure, traces=(1.0, 1.0)):
    """R over all images that the penalty has drawn, at once, and its gradient by autograd."""
    images = problem.given.images[torch.cat(problem.given.drawn).unique()]
    value = sum(MEASURES[measure](c / trace) for c, trace in zip(covariances(problem.net, images), traces, strict=True))
    found = torch.autograd.grad(value, [*problem.net.parameters()], allow_unused=True, materialize_grads=True)
    return torch.cat([x.flatten() for x in found]), value.item()


def moved(net, scale=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += scale * torch.randn_like(p)


@pytest.mark.parametrize("micro_size", [16, 64])  # three passes with, and without gradients; one pass
@pytest.mark.parametrize(("measure", "strength"), [("logdet", 0.4), ("logdet", -0.4), ("spread", -0.4), ("trace", 0.4)])
def test_the_penalty_is_differentiated_through_the_covariance_of_all_its_images(measure, strength, micro_size):
    problem = made(**penalised(strength, measure, batch__micro_size=micro_size))
    objective = RankPenalty(problem.run, TASK)
    untrained, _ = gradient(problem, objective)
    images = problem.given.images[torch.cat(problem.given.drawn).unique()]
    assert len(images) == 40
    traces = [c.trace().item() if measure == "trace" else 1.0 for c in covariances(problem.net, images)]
    moved(problem.net)
    got, value = gradient(problem, objective)
    plain, nothing = gradient(problem, Objective(TASK))
    labels = problem.given.samples[:24]
    mean_loss = cross_entropy(problem.net(problem.given.images[:24]), labels)
    of_loss = torch.cat([x.flatten() for x in torch.autograd.grad(mean_loss, [*problem.net.parameters()])])
    torch.testing.assert_close(plain, of_loss, rtol=1e-10, atol=1e-12)
    want, of_all = brute_force(problem, measure, traces)
    torch.testing.assert_close(got - plain, strength * want, rtol=1e-10, atol=1e-12)
    assert value == pytest.approx(strength * of_all, rel=1e-10)
    assert nothing == 0
    assert untrained.isfinite().all()


def test_holding_the_scale_is_nothing_at_the_untrained_network_and_goes_on_from_a_checkpoint():
    problem = made(**penalised(1.0, "trace"))
    objective = RankPenalty(problem.run, TASK)
    got, value = gradient(problem, objective)
    assert value == pytest.approx(0, abs=1e-20)  # rounding, on some processors
    torch.testing.assert_close(got, gradient(problem, Objective(TASK))[0], rtol=0, atol=1e-14)
    moved(problem.net)
    got, value = gradient(problem, objective)
    assert value > 0.01
    resumed = RankPenalty(problem.run, TASK)
    resumed.load(objective.state())
    assert torch.equal(gradient(problem, resumed)[0], got)


@pytest.mark.parametrize("of", ["logdet", "spread", "trace"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_placebo_has_the_norm_of_the_penalty_and_another_direction(of, dtype):
    settings = penalised(-0.4, "placebo", algorithm__placebo_of=of, batch__micro_size=16)
    problem = made(dtype, **settings)
    objective = RankPenalty(problem.run, TASK)
    gradient(problem, objective)
    moved(problem.net)
    plain, _ = gradient(problem, Objective(TASK))
    # the strength is large, so that the difference of two float32 gradients keeps its digits
    found = {}
    for measure in ("placebo", of):
        more = {"algorithm__placebo_of": of} if measure == "placebo" else {}
        each = RankPenalty(config(**penalised(1e4, measure, **more)), TASK)
        each.load(objective.state())
        found[measure] = gradient(problem, each)[0].double() - plain.double()
        recorded = accumulate(problem.strategy, problem.given, problem.batch, each).penalty_grad_norm.item()
        assert recorded == pytest.approx(found[measure].norm().item(), rel=1e-6)
    norms = [x.norm().item() for x in found.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert abs(torch.cosine_similarity(*found.values(), dim=0)) < 0.9


def eigenvalues(rows):
    return torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))


def moments_of(rows):
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows


def antisymmetric(size):
    drawn = torch.randn(size, size, dtype=torch.float64)
    return drawn - drawn.T


@pytest.mark.parametrize("measure", ["logdet", "spread"])
def test_a_placebo_leaves_the_eigenvalues_of_free_activations_to_second_order(measure):
    """Halving a step along the penalty halves the change of the eigenvalues; along its placebo it is a quarter."""
    torch.manual_seed(0)
    rows = (torch.randn(200, 7) @ torch.diag(torch.linspace(1, 0.2, 7)) + torch.randn(7)).double().requires_grad_()
    pull = pull_of(moments_of(rows), measure, ONE, antisymmetric(7))
    before = eigenvalues(rows.detach())
    directions = [torch.autograd.grad(moments_of(rows), rows, direction)[0] for direction in pull.directions]
    # in one layer the two pull the activations equally strongly
    assert directions[0].norm().item() == pytest.approx(directions[1].norm().item())
    for direction, order in zip(directions, (1, 2), strict=True):
        steps = [2.0**-n / direction.norm() for n in range(3, 8)]
        changes = [(eigenvalues((rows - step * direction).detach()) - before).norm().item() for step in steps]
        orders = [np.log2(a / b) for a, b in pairwise(changes)]
        assert orders[-2:] == pytest.approx([order, order], abs=0.02)


def test_parameters_move_eigenvalues_unless_the_inputs_of_the_layer_are_white():
    """A gradient step of W moves h = W x by -2 M' W S x, S the covariance of x: a pure rotation only for S = 1."""
    torch.manual_seed(0)
    raw = torch.randn(300, 6, dtype=torch.float64) @ torch.diag(torch.linspace(2, 0.3, 6).double())
    values, vectors = torch.linalg.eigh(torch.cov(raw.T, correction=0))
    found = []
    for inputs in ((raw - raw.mean(0)) @ vectors / values.sqrt(), raw):
        weight = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
        rows = inputs @ weight.T
        pull = pull_of(moments_of(rows), "logdet", ONE, antisymmetric(4))
        (direction,) = torch.autograd.grad(moments_of(rows), weight, pull.directions[1])
        changes = []
        for step in (0.02, 0.01):
            after = inputs @ (weight - step * direction / direction.norm()).T
            changes.append((eigenvalues(after.detach()) - eigenvalues(rows.detach())).norm().item())
        found.append(np.log2(changes[0] / changes[1]))
    assert found[0] == pytest.approx(2, abs=0.05)
    assert found[1] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("measure", ["logdet", "spread"])
@pytest.mark.parametrize("sign", [1, -1])
def test_either_sign_moves_the_participation_ratio_its_way(measure, sign):
    """Steps along the penalty, of nothing else."""
    problem = made(**penalised(sign * 1.0, measure, images=NUM))
    objective = RankPenalty(problem.run, TASK)
    objective.loss_sum = lambda outputs, targets: 0 * outputs.sum()

    def participation():
        values = eigenvalues(activations(problem.net, problem.given.images)[1].detach())
        return float(values.sum() ** 2 / values.square().sum())

    before = participation()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.05)
    for _ in range(40):
        gradient(problem, objective)
        optimizer.step()
    assert sign * (participation() - before) > 0.5


def test_the_images_depend_on_seed_and_step_only():
    drawn = []
    for micro_size, batch, key in [(16, 24, (3, 7)), (64, 8, (3, 7)), (64, 24, (3, 8)), (64, 24, (4, 7))]:
        problem = made(**penalised(0.1, batch__micro_size=micro_size))
        problem.batch = StepBatch(torch.arange(batch), 0, [Span(0, batch)], key)
        gradient(problem, RankPenalty(problem.run, TASK))
        half = len(problem.given.drawn) // (2 if micro_size == 16 else 1)  # drawn in two passes
        drawn.append(torch.cat(problem.given.drawn[:half]).tolist())
        assert len({*drawn[-1]}) == len(drawn[-1]) == 40
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3


@pytest.mark.parametrize("measure", MEASURES)
def test_one_row_or_a_constant_layer_has_no_penalty(measure):
    for rows in (torch.randn(1, 3).double(), torch.full((7, 3), 0.1).double()):
        pull = pull_of(moments_of(rows), measure, ONE, antisymmetric(3))
        assert pull.value == 0
        assert not torch.stack(pull.directions).any()
    problem = made(**penalised(1.0, measure, algorithm__rank_layers=("4",)))
    with torch.no_grad():
        problem.net[3].weight.zero_()
    got, value = gradient(problem, RankPenalty(problem.run, TASK))
    assert value == 0
    assert torch.equal(got, gradient(problem, Objective(TASK))[0])


@pytest.mark.parametrize("diagonal", [(1.0, -1.0, 1.0), (1.0, -1.0, -1.0), (1.0, 0.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_a_matrix_that_rounding_made_indefinite_has_no_number_and_no_direction(diagonal):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)).requires_grad_()
    value = rank_penalty._LogDet.apply(matrix)
    (gradient,) = torch.autograd.grad(value, matrix)
    assert value.isnan()
    assert gradient.isnan().any()


def test_the_log_determinant_and_its_gradient_are_those_of_torch():
    rows = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = ((rows.T @ rows).requires_grad_() for _ in range(2))
    value, expected = rank_penalty._LogDet.apply(ours), torch.logdet(theirs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    for each, matrix in ((value, ours), (expected, theirs)):
        (3.0 * each).backward()
        assert matrix.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def test_a_layer_before_every_trainable_parameter_and_one_that_is_changed_in_place():
    problem = made(**penalised(0.3, images=NUM, batch__micro_size=64))
    for p in (problem.net[0].weight, problem.net[0].bias):
        p.requires_grad_(False)
    problem.net[4] = nn.SiLU()  # its output is not needed for its gradient, so it may be changed
    problem.net.insert(5, nn.ReLU(inplace=True))
    objective = RankPenalty(problem.run, TASK)
    objective.patterns = ("1", "4")
    seen = {}
    with capture_activations(
        problem.net,
        objective.penalized_layers(problem.net, lambda: problem.given.images[:1]),
        lambda layer, output: seen.update({layer.name: output.clone()}),
    ):
        problem.net(problem.given.images)
    value = MEASURES["logdet"](torch.cov(seen["4"].T, correction=0))
    parameters = [p for p in problem.net.parameters() if p.requires_grad]
    want = torch.autograd.grad(0.3 * value, parameters, allow_unused=True, materialize_grads=True)
    found = []
    for each in (objective, Objective(TASK)):
        problem.strategy.optimizer.zero_grad()
        accumulate(problem.strategy, problem.given, problem.batch, each)
        found.append([p.grad.clone() for p in parameters])
    for a, b, c in zip(*found, want, strict=True):
        torch.testing.assert_close(a - b, c, rtol=1e-10, atol=1e-12)


def test_under_bfloat16_it_points_the_same_way():
    """Products with weights are rounded to 8 bits; the covariance and what is made of it are not."""

    class Alone(RankPenalty):
        def loss_sum(self, outputs, targets):
            return 0 * super().loss_sum(outputs, targets)

    found = []
    for dtype, autocast in ((torch.float64, None), (torch.float32, "bfloat16")):
        run = config(data__image_size=16, algorithm__rank_penalty=1.0, train__autocast=autocast)
        splits = datasets.load(run.data)
        torch.manual_seed(0)
        net = models.from_config(run, splits.spec, World()).to(dtype)
        strategy = Single(run, World())
        strategy.setup(net, partial(build_optimizer, run.optim))
        batches = BatchLoader(splits.train, Preprocess(splits.pixels, torch.device("cpu"), dtype), run.data, run.seed)
        alone = Alone(run, Classification(splits.spec))
        accumulate(strategy, batches, StepBatch(torch.arange(64), 0, [Span(0, 64)]), alone)
        found.append(torch.cat([p.grad.double().flatten() for p in net.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.98


SMALL = {
    "data__image_size": 8, "model__name": "mlp", "model__widths": (12, 10), "model__norm": "none", "train__steps": 3,
    "batch__global_size": 64, "batch__micro_size": 32, "probe__enabled": False, "train__dtype": "float64",
}  # fmt: skip


def test_a_run_records_its_images_its_penalty_and_the_noise_of_the_loss_alone(tmp_path):
    for name, more in {"plain": {}, "penalised": penalised(-5.0, images=None)}.items():
        train(tmp_path / name, **SMALL | more)
    rows = {name: [*read_metrics(tmp_path / name)] for name in ("plain", "penalised")}
    first = {name: next(row for row in rows[name] if "train/loss" in row) for name in rows}
    for key in ("train/loss", "noise_scale/gradient_squared", "noise_scale/trace_covariance"):
        assert first["penalised"][key] == pytest.approx(first["plain"][key], rel=1e-12)
    assert first["penalised"]["train/grad_norm"] != pytest.approx(first["plain"]["train/grad_norm"], rel=1e-3)
    assert first["penalised"]["train/rank_penalty"] < 0
    assert "train/rank_penalty" not in first["plain"]
    assert read_info(tmp_path / "penalised").rank_images == 4 * 12
    assert read_info(tmp_path / "plain").rank_images is None


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"algorithm__weight_averaging": "ema"},
        {"algorithm__local_sgd": "post_local_sgd", "algorithm__workers": 2, "algorithm__local_start": 0.25},
        {"algorithm__local_sgd": "swap", "algorithm__workers": 2, "algorithm__local_start": 0.75},
    ],
)
def test_a_resumed_run_holds_the_scale_of_the_network_that_was_untrained(tmp_path, algorithm):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = (
        SMALL | penalised(1.0, "trace") | {"train__steps": 4, "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    )
    train(whole, **settings | algorithm)
    shutil.copytree(whole, resumed)
    cut_after(resumed, 2)
    train(resumed, resume=True, **settings | algorithm)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    penalties = [row["train/rank_penalty"] for row in read_metrics(resumed) if "train/rank_penalty" in row]
    assert penalties[0] == 0 < penalties[-1]


def test_running_statistics_are_those_of_the_batch_alone(tmp_path):
    ghost = SMALL | {"model__norm": "ghost", "batch__ghost_size": 32, "train__steps": 1}
    found = []
    for name, more in {"plain": {}, "penalised": penalised(0.1, images=100)}.items():
        train(tmp_path / name, **ghost | more)
        found.append(weights(tmp_path / name))
    running = [name for name in found[0] if "running" in name]
    assert running
    assert all(torch.equal(found[0][name], found[1][name]) for name in running)
    assert not all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank_penalty": 0}, r"algorithm.rank_penalty \(0\) has no effect: choose a number above 0 to raise"),
        ({"rank_penalty": float("nan")}, "finite number"),
        ({"rank_penalty": -0.1, "rank_measure": "trace"}, r"\(-0.1\) would reward activations of any size"),
        (
            {"rank_penalty": 0.1, "rank_measure": "placebo"},
            r"\(placebo\) needs the measure .* set algorithm.placebo_of",
        ),
        ({"placebo_of": "logdet"}, r"algorithm.placebo_of \(logdet\) is for algorithm.rank_measure=placebo, not for"),
        ({"rank_penalty": 0.1, "rank_images": 1}, r"algorithm.rank_images \(1\)"),
        ({"rank_measure": "placebo", "placebo_of": "placebo"}, r"algorithm.placebo_of \(placebo\)"),
    ],
)
def test_bad_settings_get_one_sentence(settings, says):
    with pytest.raises(UsageError, match=says):
        config(**{f"algorithm__{name}": value for name, value in settings.items()})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algorithm__rank_images": 5_000}, r"algorithm.rank_images \(5000\) is larger than the training set of 1294"),
        (
            {"algorithm__rank_images": 33, "model__norm": "ghost", "batch__ghost_size": 32},
            r"algorithm.rank_images \(33\) on 1 rank\(s\) leaves batch norm a group of one image: choose a multiple",
        ),
        (
            {"algorithm__rank_images": 100, "model__norm": "sync", "batch__micro_size": 64},
            r"algorithm.rank_images \(100\) gives a rank 100 images, more than batch.micro_size \(64\)",
        ),
    ],
)
def test_images_that_cannot_be_had_are_refused_before_the_first_step(tmp_path, settings, says):
    with pytest.raises(UsageError, match=says):
        train(tmp_path / "out", **SMALL | {"algorithm__rank_penalty": 0.1} | settings)


def test_the_covariance_needs_every_row_only_once():
    rows = torch.randn(50, 4, dtype=torch.float64) + 3
    parts = [moments_of(part) for part in rows.split(13)]
    torch.testing.assert_close(covariance_of(sum(parts)), torch.cov(rows.T, correction=0))
