"""Steps and evaluations: what every rank does, over and over.

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

NUM_SUMS = 7  # of a step, see `accumulate`


class StepBatch(NamedTuple):
    """One step's work on one rank."""

    indices: Tensor
    """[global size] int64: the images of the whole step."""
    epoch: int
    spans: list[Span]
    """This rank's micro-batches."""
    key: tuple[int, ...] = (0,)
    """Tells this step's draws, of dropout, from others'."""


class Objective:
    """What a step minimises: the global batch's mean cross-entropy, with or without label smoothing."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        """Cross-entropy, `label_smoothing` of each target being spread over all classes."""
        self.label_smoothing = label_smoothing

    def step_context(self, strategy: Strategy, batches: BatchLoader, work: StepBatch) -> AbstractContextManager[object]:
        """Around the passes of one gradient. Collective."""
        return nullcontext()

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, summed over a micro-batch: logits [n, K], labels [n]."""
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def penalty(self) -> Tensor | float:
        """What the last forward pass adds to the loss, besides its share of the mean."""
        return 0.0

    def penalty_value(self) -> Tensor | float:
        """Of what is added, over the whole global batch; a number on the device, or one that is known."""
        return 0.0


ComputeGradient = Callable[[Strategy, BatchLoader, StepBatch, Objective], tuple[Tensor, Tensor | None]]
"""Leaves the direction of a step in the parameters' gradients. Returns the sums of `accumulate`, and the norm of the
gradient at the weights, if the step itself cannot know it. Collective."""
PLAIN_OBJECTIVE = Objective()


def train_step(
    strategy: Strategy,
    batches: BatchLoader,
    work: StepBatch,
    objective: Objective = PLAIN_OBJECTIVE,
    make: ComputeGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on a global batch, this rank doing its part. Collective.

    Returns:
        The sums of `accumulate`, and the norm of the global gradient. Both stay on the device.
    """
    strategy.begin_step(len(work.indices))
    if make is None:
        sums, norm = accumulate(strategy, batches, work, objective), None
    else:
        sums, norm = make(strategy, batches, work, objective)
    with strategy.world.timer.span("optimizer"):
        norm_of_step = strategy.step()
    return sums, norm_of_step if norm is None else norm


def accumulate(strategy: Strategy, batches: BatchLoader, work: StepBatch, objective: Objective) -> Tensor:
    """Add the gradient of the global batch to the parameters' gradients. Collective.

    Returns:
        [NUM_SUMS] float64, on the device: this rank's sum of losses and number of correct predictions; then, if the
        strategy is watching, for the noise scale |G_b|^2 and 1/b of its first micro-batch, and 1; its share of what
        the objective adds to the mean loss; and 0, where networks that step on their own put their gradients' norms.
    """
    indices, epoch, spans, key = work
    world = strategy.world
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=world.device)
    watch = strategy.track_local_grad_norm and 0 < spans[0].size < len(indices)
    with objective.step_context(strategy, batches, work):
        for number, span in enumerate(spans, 1):
            strategy.position.at(span.start, len(indices), world.size, *key)
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
            sums[0] += loss_sum.detach()
            sums[1] += (logits.detach().argmax(1) == labels).sum()
            if watch and number == 1:
                share = span.size / len(indices)
                sums[2] = strategy.local_squared_grad_norm() / share**2
                sums[3].fill_(1 / span.size)  # assigning a number would copy it, and wait for a GPU
                sums[4].fill_(1.0)
        sums[5].add_(objective.penalty_value() / world.size)
    return sums


def zero_contribution_pass(strategy: Strategy, batches: BatchLoader, epoch: int, loss: Tensor | float = 0.0) -> None:
    """A rank without samples meets the others' gradients with zeros, or with those of a `loss` of parameters alone.

    It runs one image, in eval mode, times 0; or no image at all where ranks meet in batch norm, too.
    """
    images, _ = batches(torch.zeros(1, dtype=torch.int64), epoch)
    strategy.model.train(strategy.has_sync_bn)
    with strategy.world.timer.span("forward"):
        nothing = strategy.forward(images[:0] if strategy.has_sync_bn else images).sum() * 0
    with strategy.world.timer.span("backward"):
        strategy.backward(nothing + loss)
    strategy.model.train()
