"""One training step on one rank: forward, backward, optimizer.

Shapes: n samples of one micro-batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.step_metrics import StepMetrics, zero_metrics
from gengap_dist.training.tasks import Task


class StepBatch(NamedTuple):
    """The samples of one step, and this rank's share."""

    indices: Tensor
    """[global size] int64: the samples of the whole step."""
    epoch: int
    spans: list[Span]
    """This rank's micro-batches."""
    rng_key: tuple[int, ...] = (0,)
    """Seeds the random numbers of this step, for example of dropout."""
    targets_each: Tensor | int = 1
    """Number of targets of each sample of the training set, [N] int64 on the CPU; an int: of all samples."""

    def num_targets(self, span: Span | None = None) -> int:
        """The number of targets of the whole step, or of a span of it; known on every rank without communication."""
        indices = self.indices if span is None else self.indices[span.start : span.stop]
        each = self.targets_each
        return each * len(indices) if isinstance(each, int) else int(each[indices].sum())


def targets_each(task: Task, targets: Tensor) -> Tensor | int:
    """`StepBatch.targets_each` of a training set with `targets` [N, ...]."""
    each_N = task.num_targets(targets).cpu()
    first = int(each_N[0])
    return first if (each_N == first).all() else each_N


class Objective:
    """The objective of a step: the mean training loss over the targets of the global batch, and perhaps a penalty."""

    def __init__(self, task: Task) -> None:
        """The loss of `task`."""
        self.task = task

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss, summed over the targets of a micro-batch."""
        return self.task.training_loss_sum(outputs, targets)

    def add_to(
        self, sums: StepMetrics[Tensor], outputs: Tensor, targets: Tensor, loss_sum: Tensor, num_targets: int
    ) -> None:
        """Add what is recorded of a micro-batch to `sums`, in place."""
        sums.loss_sum.add_(loss_sum.detach())
        if self.task.has_training_loss:
            sums.plain_loss_sum.add_(self.task.loss_sum(outputs.detach(), targets))
        sums.metric_sum.add_(self.task.metric_sum(outputs.detach(), targets))
        sums.num_targets.add_(num_targets)

    def add_penalty(
        self, strategy: Strategy, batches: BatchLoader, step_batch: StepBatch, sums: StepMetrics[Tensor]
    ) -> None:
        """Add the gradient of a penalty to the parameters' gradients, and what is recorded of it to `sums`. Collective.

        The gradients are those of the loss of the global batch, summed over ranks.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""


ComputeGradient = Callable[[Strategy, BatchLoader, StepBatch, Objective], tuple[StepMetrics[Tensor], Tensor | None]]
"""Writes the direction of a step to the parameters' gradients. Returns the sums of `accumulate`, and the norm of the
gradient at the weights, or None if the strategy computes it. Collective."""


def train_step(
    strategy: Strategy,
    batches: BatchLoader,
    step_batch: StepBatch,
    objective: Objective,
    compute_gradient: ComputeGradient | None = None,
) -> tuple[StepMetrics[Tensor], Tensor]:
    """One optimizer step on a global batch, on this rank's share. Collective.

    Returns:
        The sums of `accumulate`, and the norm of the global gradient, both on the device.
    """
    strategy.begin_step(len(step_batch.indices))
    if compute_gradient is None:
        sums, norm = accumulate(strategy, batches, step_batch, objective), None
    else:
        sums, norm = compute_gradient(strategy, batches, step_batch, objective)
    with strategy.world.timer.span("optimizer"):
        norm_of_step = strategy.step()
    return sums, norm_of_step if norm is None else norm


def accumulate(
    strategy: Strategy, batches: BatchLoader, step_batch: StepBatch, objective: Objective
) -> StepMetrics[Tensor]:
    """Add the gradient of the global batch to the parameters' gradients. Collective.

    Returns:
        This rank's sums of losses, of the task's metric, of targets and of the penalty; if track_local_grad_norm is
        set, also those of the noise scale. The others are 0.
    """
    indices, epoch, spans, key, _ = step_batch
    num_targets = max(1, step_batch.num_targets())
    world = strategy.world
    sums = zero_metrics(world.device)
    track_norm = strategy.track_local_grad_norm and 0 < spans[0].size < len(indices)
    for number, span in enumerate(spans, 1):
        strategy.position.move_to(span.start, len(indices), world.size, *key)
        with strategy.micro_step(last=number == len(spans)):
            if not span.size:
                zero_contribution_pass(strategy, batches, epoch)
                continue
            with world.timer.phase("data"):
                inputs, targets = batches(indices[span.start : span.stop], epoch)
            with world.timer.span("forward"):
                outputs = strategy.forward(inputs)
                loss_sum = objective.loss_sum(outputs, targets)
            with world.timer.span("backward"):
                strategy.backward(loss_sum / num_targets)
        own_targets = step_batch.num_targets(span)
        objective.add_to(sums, outputs, targets, loss_sum, own_targets)
        if track_norm and number == 1 and own_targets:
            share = own_targets / num_targets
            sums.local_squared_norm.copy_(strategy.local_squared_grad_norm() / share**2)
            sums.local_inverse_size.fill_(1 / span.size)  # assigning a number would synchronise with the GPU
            sums.num_local_norms.fill_(1.0)
    objective.add_penalty(strategy, batches, step_batch, sums)
    return sums


def zero_contribution_pass(strategy: Strategy, batches: BatchLoader, epoch: int, loss: Tensor | float = 0.0) -> None:
    """A rank with no samples joins the gradient all-reduce with zeros, or with the gradients of `loss`.

    It runs one sample in eval mode and multiplies the output by 0; with sync batch norm it runs an empty batch.
    `loss` may depend on parameters only.
    """
    inputs, _ = batches(torch.zeros(1, dtype=torch.int64), epoch)
    strategy.model.train(strategy.has_sync_bn)
    with strategy.world.timer.span("forward"):
        zero = strategy.forward(inputs[:0] if strategy.has_sync_bn else inputs).sum() * 0
    with strategy.world.timer.span("backward"):
        strategy.backward(zero + loss)
    strategy.model.train()
