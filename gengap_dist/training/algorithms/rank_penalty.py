"""A penalty that raises or lowers the rank of activations directly, and its placebo, for causal experiments.

The covariance of activations comes from training images of a stream of its own: in each step the same ones in all arms
of a seed, whatever the batch, the number of ranks and the size of micro-batches.

Shapes: N rows (images, or images x positions of a convolution) of all ranks, D units, P trainable parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gengap_dist.config.measures import RankMeasure
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.batch_plan import BatchPlan, Span
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import frozen_running_stats, has_batch_norm
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.probes.activations import capture_activations, eval_context
from gengap_dist.probes.layers import select_layers
from gengap_dist.probes.trace import Layer
from gengap_dist.training.step import Objective, StepBatch
from gengap_dist.training.step_metrics import StepMetrics
from gengap_dist.training.tasks import Task

FLOOR = 1e-3  # relative to the mean eigenvalue; so a dead unit costs 7, not infinity
IMAGES_PER_UNIT = 4  # of the default of algorithm.rank_images: with fewer, the covariance itself loses ranks
CONSTANT = 1e-12  # of the mean square: a smaller variance is the rounding of a unit that is the same for all images
IMAGES, ROTATION = 8, 9  # purposes of `seeded_rng`


def logdet(covariance_DD: Tensor) -> Tensor:
    """-1/D sum_i log(l_i / mean(l) + FLOOR): -0.001 if all eigenvalues l are equal, larger for lower rank, at most 6.9.

    >>> round(logdet(torch.eye(3).double()).item(), 4), round(logdet(torch.diag(torch.tensor([1.0, 1e-9]))).item(), 4)
    (-0.001, 3.1071)
    """
    size = len(covariance_DD)
    relative = covariance_DD / (covariance_DD.trace() / size)
    log_det: Tensor = _LogDet.apply(relative + FLOOR * torch.eye(size, dtype=relative.dtype, device=relative.device))  # pyright: ignore[reportAssignmentType]
    return -log_det / size


class _LogDet(torch.autograd.Function):
    """log det of a positive definite matrix, and its inverse as the gradient, by one Cholesky factor; else NaN, both.

    `torch.logdet` factors a general matrix, and takes 2.2 times as long with its gradient (1,024 x 1,024).
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        factor = torch.where(failed == 0, factor, torch.nan)  # it is half done
        ctx.save_for_backward(factor)
        return 2 * factor.diagonal().log().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = ctx.saved_tensors
        return grads[0] * torch.cholesky_inverse(factor)


def spread(covariance_DD: Tensor) -> Tensor:
    """1/D sum_i (l_i / mean(l) - 1)^2 = D |C|^2 / tr(C)^2 - 1 = D / participation ratio - 1: from 0 to D - 1.

    >>> spread(torch.eye(3)).item(), spread(torch.diag(torch.tensor([1.0, 0.0]))).item()
    (0.0, 1.0)
    """
    return len(covariance_DD) * covariance_DD.square().sum() / covariance_DD.trace().square() - 1


def trace(covariance_DD: Tensor) -> Tensor:
    """(tr C - 1)^2 of C divided by the untrained network's trace: holds the scale of activations, not their rank.

    >>> trace(torch.eye(2) / 2).item(), trace(torch.eye(2)).item()
    (0.0, 1.0)
    """
    return (covariance_DD.trace() - 1).square()


MEASURES: dict[RankMeasure, Callable[[Tensor], Tensor]] = {"logdet": logdet, "spread": spread, "trace": trace}


def covariance_of(moments: Tensor) -> Tensor:
    """C [D, D] from the sums [D + 1, D + 1] of [h 1]' [h 1] over rows h: of h h', of h, and the number of rows.

    >>> rows = torch.tensor([[0.0, 1.0], [2.0, 1.0]])  # and a column of ones: the second unit is constant
    >>> covariance_of(torch.cat([rows, torch.ones(2, 1)], 1).T @ torch.cat([rows, torch.ones(2, 1)], 1)).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    means = moments / moments[-1, -1]
    return means[:-1, :-1] - torch.outer(means[:-1, -1], means[-1, :-1])


def rotation(covariance_DD: Tensor, pull_DD: Tensor, antisymmetric_DD: Tensor) -> Tensor:
    """M' = a (C K - K C), a >= 0 such that it pulls activations as strongly as M = `pull_DD`: tr M' C M' = tr M C M.

    A step of activations along M' (h - mean) turns the eigenvectors of C: d C ~ M' C + C M' = a [C^2, K] has no
    diagonal in the eigenbasis of C, so the eigenvalues stand still to first order. 0 if C and K commute.

    >>> turn = rotation(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    >>> turn.tolist()  # symmetric, without diagonal; tr M' C M' = 1 * (4 + 1) = tr M C M
    [[0.0, 1.0], [1.0, 0.0]]
    """
    product = covariance_DD @ antisymmetric_DD  # C K - K C = C K + (C K)', by C = C' and K = -K'
    turn = product + product.T
    of_pull, of_turn = (((matrix @ covariance_DD) * matrix).sum().clamp_min(0) for matrix in (pull_DD, turn))
    return turn * torch.where(of_turn > 0, of_pull / of_turn, torch.zeros_like(of_turn)).sqrt()


class Pull(NamedTuple):
    """What a layer's sums of moments say: a measure R of C, and in which directions the sums should move."""

    value: Tensor
    """R, a scalar."""
    directions: list[Tensor]
    """[D + 1, D + 1] each, gradients with respect to the sums: of R, and of tr(M' C) with a placebo's constant M'."""


def pull_of(moments: Tensor, measure: RankMeasure, untrained_trace: Tensor, antisymmetric_DD: Tensor | None) -> Pull:
    """R of a layer and its gradient, all on the device; both 0 with one row, or if all rows are the same.

    Args:
        moments: [D + 1, D + 1] sums over the rows of all ranks, see `covariance_of`.
        measure: R.
        untrained_trace: tr C of the untrained network, for `trace`.
        antisymmetric_DD: K of a placebo; None: no placebo.
    """
    moments = moments.detach().requires_grad_()
    with torch.enable_grad():
        covariance = covariance_of(moments)
        mean_squares = moments.diagonal()[:-1].sum() / moments[-1, -1]
        is_alive = (covariance.trace() > CONSTANT * mean_squares) & (untrained_trace > 0)
        identity = torch.eye(len(covariance), dtype=moments.dtype, device=moments.device)
        alive = torch.where(is_alive, covariance, identity)
        scale = torch.where(is_alive, untrained_trace, 1.0) if measure == "trace" else 1.0
        value = torch.where(is_alive, MEASURES[measure](alive / scale), 0.0)
        (pull,) = torch.autograd.grad(value, covariance, retain_graph=True)
        pulls = [pull]
        if antisymmetric_DD is not None:
            pulls.append(rotation(covariance.detach(), pull, antisymmetric_DD))
        directions = [torch.autograd.grad(covariance, moments, each, retain_graph=True)[0] for each in pulls]
    return Pull(value.detach(), directions)


@final
class RankPenalty(Objective):
    """The training loss plus `strength` times R(C), summed over layers, C of `num_images` images of a stream.

    The images of a step are drawn from (seed, step) without replacement, and are not augmented. Batch norm takes
    statistics as in training, over micro-batches or ghost groups of the stream, and running statistics stay.

    R is a function of sums over rows, to which each micro-batch of each rank adds its own. A pass without gradients
    gives the sums A of all, hence the constant dR/dA; a second one gives each micro-batch's gradient of
    <dR/dA, its own sums>, and these add up to the gradient of R, exactly. A rank with one micro-batch keeps its graph
    and does without the second pass.

    A placebo takes the gradient of tr(M' C) with the constant M' of `rotation` in place of that of R, and gives it the
    norm that |strength| times the gradient of R has, at every step and over all parameters: two backward passes.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        """See AlgorithmConfig."""
        super().__init__(task)
        algorithm = config.algorithm
        self.config, self.strength, self.patterns = config, algorithm.rank_penalty or 0.0, algorithm.rank_layers
        self.is_placebo = algorithm.rank_measure == "placebo"
        measure = algorithm.placebo_of if algorithm.rank_measure == "placebo" else algorithm.rank_measure
        assert measure is not None
        self.measure: RankMeasure = measure
        self.untrained_traces: Tensor | None = None
        """tr C of each layer of the untrained network, [layers], from the images of its first step; for `trace`."""
        self._layers: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()
        self._antisymmetric: dict[int, Tensor] = {}

    def penalized_layers(self, model: nn.Module, example: Callable[[], Tensor]) -> list[Layer]:
        """The penalized layers, found in one pass of an example.

        Raises:
            UsageError: if a pattern matches no layer.
        """
        if model not in self._layers:
            try:
                with eval_context(model):
                    self._layers[model] = select_layers(model, example(), self.patterns)
            except UsageError as error:
                raise UsageError(str(error).replace("probe.layers", "algorithm.rank_layers")) from None
        return self._layers[model]

    def num_images(self, layers: list[Layer], num_samples: int) -> int:
        """Images of the stream in each step: algorithm.rank_images of `num_samples`.

        Raises:
            UsageError: if there are fewer.
        """
        num = self.config.algorithm.rank_images
        if num is None:
            return min(IMAGES_PER_UNIT * max(map(_units, layers)), num_samples)
        if num > num_samples:
            raise UsageError(
                f"algorithm.rank_images ({num}) is larger than the training set of {num_samples} samples: choose at "
                f"most {num_samples}, or null"
            )
        return num

    def check(self, model: nn.Module, example: Callable[[], Tensor], num_samples: int, num_ranks: int) -> int:
        """Refuse layers that do not exist, and images that cannot be drawn or normalised; returns their number.

        Args:
            model: the network.
            example: returns inputs [n, ...].
            num_samples: size of the training set.
            num_ranks: ranks of the run.

        Raises:
            UsageError: names algorithm.rank_layers or algorithm.rank_images.
        """
        num = self.num_images(self.penalized_layers(model, example), num_samples)
        batch, is_sync = self.config.batch, self.config.norm == "sync"
        if not has_batch_norm(model):
            return num
        share = -(-num // num_ranks)
        if is_sync and share > batch.max_micro_size:
            raise UsageError(
                f"algorithm.rank_images ({num}) gives a rank {share} images, more than batch.micro_size "
                f"({batch.micro_size}), and model.norm (sync) computes statistics over all of them at once: choose a "
                "micro_size of at least that, fewer rank_images, or model.norm=ghost"
            )
        splits = {num_ranks, 1} if self.config.algorithm.local_sgd else {num_ranks}
        if not is_sync and any(1 in self._plan(num, size).norm_sizes() for size in splits):
            raise UsageError(
                f"algorithm.rank_images ({num}) on {num_ranks} rank(s) leaves batch norm a group of one image: choose "
                f"a multiple of {batch.ghost_size or batch.max_micro_size}"
            )
        return num

    def _plan(self, num_images: int, num_ranks: int) -> BatchPlan:
        batch = self.config.batch
        return BatchPlan(num_images, num_ranks, batch.max_micro_size, batch.ghost_size)

    def add_penalty(
        self, strategy: Strategy, batches: BatchLoader, step_batch: StepBatch, sums: StepMetrics[Tensor]
    ) -> None:
        """See `Objective.add_penalty`. Collective: a sum of moments, and one of gradients, over ranks."""
        model, world = strategy.model, strategy.world
        layers = self.penalized_layers(model, lambda: batches(step_batch.indices[:1], step_batch.epoch)[0])
        stream = self._stream(layers, len(batches.samples), strategy, step_batch)
        with frozen_running_stats(model), capturing_moments(model, layers) as capture:
            moments = partial(_moments_of_images, strategy, batches, stream, capture)
            keeps_graph, totals, own = len(stream.spans) == 1, _zeros(layers, world.device), []
            with torch.set_grad_enabled(keeps_graph):
                for span in stream.spans:
                    own = moments(span)
                    for total, moment in zip(totals, own, strict=True):
                        total += moment.detach()
            pulls = self._pulls(_summed_over_ranks(totals, world), stream.seed)
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = parameters[0].new_zeros(len(pulls[0].directions), sum(p.numel() for p in parameters))
            for span in stream.spans:
                own = own if keeps_graph else moments(span)
                with world.timer.span("backward"):
                    for number, gradient in enumerate(gradients):  # of R, of a placebo: [P] each
                        directions = [pull.directions[number] for pull in pulls]
                        gradient += _flat_gradient(own, parameters, directions, keep=number + 1 < len(gradients))
        world.all_reduce(gradients, "gradient of the rank penalty")
        sums.penalty.add_(self.strength * torch.stack([pull.value for pull in pulls]).sum() / world.size)
        if strategy.track_local_grad_norm:
            sums.loss_grad_norm.add_(strategy.gradient_norm() / world.size)  # equal on all ranks
        direction = self._direction(gradients)
        sums.penalty_grad_norm.add_(torch.linalg.vector_norm(direction, dtype=torch.float64) / world.size)
        _add_to_gradients(parameters, direction)

    def _stream(self, layers: list[Layer], num_samples: int, strategy: Strategy, step_batch: StepBatch) -> "Stream":
        seed, *step = step_batch.rng_key[:2]
        num, world = self.num_images(layers, num_samples), strategy.world
        drawn = seeded_rng(seed, IMAGES, *step).choice(num_samples, num, replace=False)
        spans = self._plan(num, world.size).micro_batches(world.rank)
        has_pass = [span for span in spans if span.size or strategy.has_sync_bn]  # whose passes contain collectives
        return Stream(torch.from_numpy(drawn), has_pass, seed, (seed, *step, IMAGES, 0))

    def _pulls(self, totals: list[Tensor], seed: int) -> list[Pull]:
        if self.measure == "trace" and self.untrained_traces is None:  # this is the first step
            self.untrained_traces = torch.stack([covariance_of(total).trace() for total in totals])
        traces = totals[0].new_ones(len(totals)) if self.untrained_traces is None else self.untrained_traces
        return [
            pull_of(
                total, self.measure, traces[number], self._rotation(seed, number, total) if self.is_placebo else None
            )
            for number, total in enumerate(totals)
        ]

    def _rotation(self, seed: int, number: int, moments: Tensor) -> Tensor:
        """K [D, D] of layer `number`, the same throughout a run and in all arms of a seed."""
        if number not in self._antisymmetric:
            size = len(moments) - 1
            drawn = torch.from_numpy(seeded_rng(seed, ROTATION, number).standard_normal((size, size)))
            self._antisymmetric[number] = (drawn - drawn.T).to(moments)
        return self._antisymmetric[number]

    def _direction(self, gradients: Tensor) -> Tensor:
        """[P], what is added to the gradient of the loss."""
        if not self.is_placebo:
            return self.strength * gradients[0]
        norm, of_placebo = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
        factor = torch.where(of_placebo > 0, norm / of_placebo, 0.0)
        return (abs(self.strength) * factor).to(gradients.dtype) * gradients[1]

    def state(self) -> dict[str, Any]:
        """See `Objective.state`."""
        return {} if self.untrained_traces is None else {"untrained_traces": self.untrained_traces}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `Objective.load`."""
        self.untrained_traces = state.get("untrained_traces")


class _Moments(torch.autograd.Function):
    """X' X of rows X; autograd would take one product for each of the two X in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.T @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """X (G + G')."""
        (rows,) = ctx.saved_tensors
        return rows @ (grads[0] + grads[0].T)


@contextmanager
def capturing_moments(
    model: nn.Module, layers: list[Layer]
) -> Iterator[Callable[[Callable[[], object]], list[Tensor]]]:
    """While open, a function that makes a pass and returns the sums of moments of `layers`.

    They are [D + 1, D + 1] float64 each, differentiable, and taken before a later layer can change an activation in
    place.
    """
    found: dict[str, Tensor] = {}

    def add(layer: Layer, output: Tensor) -> None:
        rows = (output if layer.channels_last else output.movedim(1, -1)).flatten(0, -2).double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        found[layer.name] = _Moments.apply(rows)

    with capture_activations(model, layers, add) as capture:

        def moments(make_pass: Callable[[], object]) -> list[Tensor]:
            capture.begin_pass()
            found.clear()
            make_pass()
            taken = [found[layer.name] for layer in layers]
            found.clear()  # the graph is freed with its last user
            return taken

        yield moments


class Stream(NamedTuple):
    """The images of the penalty in one step."""

    indices: Tensor
    """[images] int64, in the training set."""
    spans: list[Span]
    """This rank's micro-batches."""
    seed: int
    """Of the run."""
    key: tuple[int, ...]
    """Seeds the random numbers of these passes, for example of dropout."""


def _moments_of_images(
    strategy: Strategy,
    batches: BatchLoader,
    stream: Stream,
    capture: Callable[[Callable[[], object]], list[Tensor]],
    span: Span,
) -> list[Tensor]:
    """The sums of moments of one micro-batch."""
    world = strategy.world
    strategy.position.move_to(span.start, len(stream.indices), world.size, *stream.key)
    with world.timer.phase("data"):
        inputs = batches.plain(stream.indices[span.start : span.stop] if span.size else stream.indices[:1])
    with world.timer.span("forward"):
        return capture(lambda: strategy.local_forward(inputs if span.size else inputs[:0]))


def _zeros(layers: list[Layer], device: torch.device) -> list[Tensor]:
    sizes = [_units(layer) + 1 for layer in layers]
    return [torch.zeros(size, size, dtype=torch.float64, device=device) for size in sizes]


def _summed_over_ranks(totals: list[Tensor], world: World) -> list[Tensor]:
    """Collective."""
    flat = world.all_reduce(torch.cat([total.flatten() for total in totals]), "covariance of activations")
    parts = flat.split([total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]


@torch.no_grad()
def _add_to_gradients(parameters: list[nn.Parameter], direction_P: Tensor) -> None:
    for p, part in zip(parameters, direction_P.split([p.numel() for p in parameters]), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad += part.view_as(p)


def _flat_gradient(
    moments: list[Tensor], parameters: list[nn.Parameter], directions: list[Tensor], *, keep: bool
) -> Tensor:
    """[P], of the sum over layers of <direction, moments>; with `keep` the graph can be used again."""
    pairs = [(each, at) for each, at in zip(moments, directions, strict=True) if each.requires_grad]
    if not pairs:  # no trainable parameter comes before the layers
        return torch.zeros((), dtype=parameters[0].dtype, device=parameters[0].device)
    outputs, grad_outputs = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(
        outputs, parameters, grad_outputs, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def _units(layer: Layer) -> int:
    return layer.output[-1 if layer.channels_last else 1]
