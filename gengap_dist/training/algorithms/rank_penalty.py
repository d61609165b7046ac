"""A penalty that increases the rank of activations directly, for causal experiments.

Shapes: N rows (samples, or samples x positions of a convolution) of the whole global batch, D units.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gengap_dist.config.sections import AlgorithmConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.probes.activations import capture_activations, eval_context
from gengap_dist.probes.layers import select_layers
from gengap_dist.probes.trace import Layer
from gengap_dist.training.step import Objective, StepBatch
from gengap_dist.training.tasks import Task

FLOOR = 1e-3  # relative to the mean eigenvalue; so a dead unit costs 7, not infinity


def logdet(covariance_DD: Tensor) -> Tensor:
    """-1/D sum_i log(l_i / mean(l) + FLOOR): 0 (up to FLOOR) if all eigenvalues l are equal, larger for lower rank.

    >>> round(logdet(torch.eye(3).double()).item(), 4), round(logdet(torch.diag(torch.tensor([1.0, 1e-9]))).item(), 4)
    (-0.001, 3.1071)
    """
    size = len(covariance_DD)
    relative = covariance_DD / (covariance_DD.trace() / size)
    return -torch.logdet(relative + FLOOR * torch.eye(size, dtype=relative.dtype, device=relative.device)) / size


def spread(covariance_DD: Tensor) -> Tensor:
    """1/D sum_i (l_i / mean(l) - 1)^2 = D |C|^2 / tr(C)^2 - 1 = D / participation ratio - 1.

    >>> spread(torch.eye(3)).item(), spread(torch.diag(torch.tensor([1.0, 0.0]))).item()
    (0.0, 1.0)
    """
    return len(covariance_DD) * covariance_DD.square().sum() / covariance_DD.trace().square() - 1


MEASURES = {"logdet": logdet, "spread": spread}


@final
class RankPenalty(Objective):
    """Cross-entropy plus `strength` times a measure of the activations' covariance C over the whole global batch.

    C depends on every rank and micro-batch, and so does the gradient. One pass without gradients computes C and the
    mean m. With the constant M = dR/dC, every row h of the training pass then adds (h - m)^T M (h - m) / N, whose
    gradient 2 M (h - m) / N is exactly that of R.
    """

    def __init__(self, config: AlgorithmConfig, task: Task) -> None:
        """See AlgorithmConfig."""
        super().__init__(task)
        self.strength, self.patterns = config.rank_penalty or 0.0, config.rank_layers
        self.measure = MEASURES[config.rank_measure]
        self._layers: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()
        self._terms: list[Tensor] = []
        self._value: Tensor | float = 0.0

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

    @contextmanager
    def step_context(self, strategy: Strategy, batches: BatchLoader, step_batch: StepBatch) -> Iterator[None]:
        """See `Objective.step_context`. Collective: one forward pass, and one sum over ranks."""
        model, world = strategy.model, strategy.world
        layers = self.penalized_layers(model, lambda: batches(step_batch.indices[:1], step_batch.epoch)[0])
        sums = {
            layer.name: torch.zeros(units + 1, units + 1, dtype=torch.float64, device=world.device)
            for layer, units in ((layer, _units(layer)) for layer in layers)
        }

        def add(layer: Layer, output: Tensor) -> None:
            rows = _rows(layer, output).double()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # [rows, D + 1]
            sums[layer.name] += rows.T @ rows  # sums of h h^T and h, and the number of rows

        with torch.no_grad(), frozen_running_stats(model), capture_activations(model, layers, add) as capture:
            for span in step_batch.spans:
                if span.size or strategy.has_sync_bn:
                    capture.begin_pass()
                    strategy.position.move_to(span.start, len(step_batch.indices), world.size, *step_batch.rng_key)
                    inputs, _ = batches(
                        step_batch.indices[span.start : span.stop] if span.size else step_batch.indices[:1],
                        step_batch.epoch,
                    )
                    with world.timer.span("forward"):
                        strategy.local_forward(inputs if span.size else inputs[:0])
        moments = world.all_reduce(
            torch.cat([matrix.flatten() for matrix in sums.values()]), "covariance of activations"
        )
        weights, values = {}, []
        for layer, flat in zip(layers, moments.split([matrix.numel() for matrix in sums.values()]), strict=True):
            value, mean_D, matrix_DD, count = self._linearise(flat)
            values.append(value)
            weights[layer.name] = mean_D, matrix_DD / count
        self._value = self.strength * torch.stack(values).sum()

        def add_penalty(layer: Layer, output: Tensor) -> None:
            kind = torch.promote_types(output.dtype, torch.float32)  # differences would be lost in bfloat16
            mean_D, matrix_DD = (tensor.to(kind) for tensor in weights[layer.name])
            with torch.autocast(output.device.type, enabled=False):
                rows = _rows(layer, output).to(kind) - mean_D
                self._terms.append((rows @ matrix_DD * rows).sum())

        with capture_activations(model, layers, add_penalty) as capture:

            def reset(module: nn.Module, args: object) -> None:
                capture.begin_pass()
                self._terms.clear()

            hook = model.register_forward_pre_hook(reset)
            try:
                yield
            finally:
                hook.remove()
                self._terms.clear()

    def _linearise(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R(C), m, dR/dC and N from the summed moments, all on the device.

        With one row, or for a dead layer, R and its gradient are 0.
        """
        size = int(flat.numel() ** 0.5)
        moments = flat.view(size, size) / flat[-1]
        mean_D = moments[-1, :-1]
        covariance = moments[:-1, :-1] - torch.outer(mean_D, mean_D)
        alive = covariance.trace() > 0
        covariance = torch.where(
            alive, covariance, torch.eye(size - 1, dtype=flat.dtype, device=flat.device)
        ).requires_grad_()
        with torch.enable_grad():
            value = self.measure(covariance)
            (matrix,) = torch.autograd.grad(value, covariance)
        zero = torch.zeros_like(value)
        return (
            torch.where(alive, value.detach(), zero),
            mean_D,
            torch.where(alive, matrix + matrix.T, zero) / 2,
            flat[-1],
        )

    def penalty(self) -> Tensor | float:
        """See `Objective.penalty`."""
        return self.strength * sum(self._terms)

    def penalty_value(self) -> Tensor | float:
        """See `Objective.penalty_value`."""
        return self._value


def _units(layer: Layer) -> int:
    return layer.output[-1 if layer.channels_last else 1]


def _rows(layer: Layer, output: Tensor) -> Tensor:
    """[rows, D] of a layer's output."""
    return (output if layer.channels_last else output.movedim(1, -1)).flatten(0, -2)
