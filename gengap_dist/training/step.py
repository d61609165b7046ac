"""One training step on one rank: forward, backward, optimizer.

Shapes: n samples of one micro-batch, C x H x W pixels, K classes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.step_metrics import StepMetrics, zero_metrics


class StepBatch(NamedTuple):
    """The samples of one step, and this rank's share."""

    indices: Tensor
    """[global size] int64: the images of the whole step."""
    epoch: int
    spans: list[Span]
    """This rank's micro-batches."""
    rng_key: tuple[int, ...] = (0,)
    """Seeds the random numbers of this step, for example of dropout."""


class Objective:
    """The objective of a step: mean cross-entropy over the global batch, with optional label smoothing."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        """Cross-entropy; the fraction `label_smoothing` of each target is spread over all classes."""
        self.label_smoothing = label_smoothing

    def step_context(
        self, strategy: Strategy, batches: BatchLoader, step_batch: StepBatch
    ) -> AbstractContextManager[object]:
        """Context for all passes of one gradient. Collective."""
        return nullcontext()

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, summed over a micro-batch: logits [n, K], labels [n]."""
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def penalty(self) -> Tensor | float:
        """The penalty of the last forward pass, added to its share of the mean loss."""
        return 0.0

    def penalty_value(self) -> Tensor | float:
        """The penalty over the whole global batch: a scalar on the device, or a float."""
        return 0.0


ComputeGradient = Callable[[Strategy, BatchLoader, StepBatch, Objective], tuple[StepMetrics[Tensor], Tensor | None]]
"""Writes the direction of a step to the parameters' gradients. Returns the sums of `accumulate`, and the norm of the
gradient at the weights, or None if the strategy computes it. Collective."""
PLAIN_OBJECTIVE = Objective()


def train_step(
    strategy: Strategy,
    batches: BatchLoader,
    step_batch: StepBatch,
    objective: Objective = PLAIN_OBJECTIVE,
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
        This rank's sums of losses, correct predictions and penalty; if track_local_grad_norm is set, also those of the
        noise scale. The others are 0.
    """
    indices, epoch, spans, key = step_batch
    world = strategy.world
    sums = zero_metrics(world.device)
    track_norm = strategy.track_local_grad_norm and 0 < spans[0].size < len(indices)
    with objective.step_context(strategy, batches, step_batch):
        for number, span in enumerate(spans, 1):
            strategy.position.move_to(span.start, len(indices), world.size, *key)
            with strategy.micro_step(last=number == len(spans)):
                if not span.size:
                    zero_contribution_pass(strategy, batches, epoch)
                    continue
                with world.timer.phase("data"):
                    images, labels = batches(indices[span.start : span.stop], epoch)
                with world.timer.span("forward"):
                    logits = strategy.forward(images)
                    loss_sum = objective.loss_sum(logits, labels)
                    loss = loss_sum / len(indices) + objective.penalty()
                with world.timer.span("backward"):
                    strategy.backward(loss)
            sums.loss_sum.add_(loss_sum.detach())
            sums.num_correct.add_((logits.detach().argmax(1) == labels).sum())
            if track_norm and number == 1:
                share = span.size / len(indices)
                sums.local_squared_norm.copy_(strategy.local_squared_grad_norm() / share**2)
                sums.local_inverse_size.fill_(1 / span.size)  # assigning a number would synchronise with the GPU
                sums.num_local_norms.fill_(1.0)
        sums.penalty.add_(objective.penalty_value() / world.size)
    return sums


def zero_contribution_pass(strategy: Strategy, batches: BatchLoader, epoch: int, loss: Tensor | float = 0.0) -> None:
    """A rank with no samples joins the gradient all-reduce with zeros, or with the gradients of `loss`.

    It runs one image in eval mode and multiplies the output by 0; with sync batch norm it runs an empty batch.
    `loss` may depend on parameters only.
    """
    images, _ = batches(torch.zeros(1, dtype=torch.int64), epoch)
    strategy.model.train(strategy.has_sync_bn)
    with strategy.world.timer.span("forward"):
        zero = strategy.forward(images[:0] if strategy.has_sync_bn else images).sum() * 0
    with strategy.world.timer.span("backward"):
        strategy.backward(zero + loss)
    strategy.model.train()
