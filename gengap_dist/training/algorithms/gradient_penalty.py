"""Gradient penalty: the mean loss plus a multiple of the squared gradient norms of groups of samples."""

import torch
from torch import Tensor, nn

from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.sam import TINY, perturbed
from gengap_dist.training.step import ComputeGradient, Objective, StepBatch, zero_contribution_pass
from gengap_dist.training.step_metrics import StepMetrics, zero_metrics

STEP = 0.01  # length of the forward difference in parameter space, as in DARTS (Liu et al. 2019)


def gradient_penalty(coefficient: float) -> ComputeGradient:
    """Gradient of the mean loss + c/2 mean_b |g_b|^2, the mean over groups of samples: g + c mean_b H_b g_b.

    H_b g_b is the forward difference (g_b(w + e g_b) - g_b(w)) / e with e = 0.01 / |g_b|. Every span of the step is one
    group. With c = lr / 2 it is the bias of plain SGD's own steps (Smith et al. 2021), made explicit (Geiping et al.
    2022).
    """

    def compute_gradient(
        strategy: Strategy, batches: BatchLoader, step_batch: StepBatch, objective: Objective
    ) -> tuple[StepMetrics[Tensor], None]:
        world = strategy.world
        parameters = [p for p in strategy.model.parameters() if p.requires_grad]
        direction = [torch.zeros_like(p) for p in parameters]
        sums = zero_metrics(world.device)

        num_targets = max(1, step_batch.num_targets())

        def gradient(span: Span, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            strategy.position.move_to(span.start, len(step_batch.indices), world.size, *step_batch.rng_key)
            with world.timer.span("forward"):
                outputs = strategy.local_forward(inputs)
                loss_sum = objective.loss_sum(outputs, targets)
            with world.timer.span("backward"):
                mean_loss = loss_sum / max(1, step_batch.num_targets(span))
                gradients = torch.autograd.grad(mean_loss, parameters, materialize_grads=True)
            return outputs, loss_sum, gradients

        for span in step_batch.spans:
            if not span.size:
                continue
            with world.timer.phase("data"):
                inputs, targets = batches(step_batch.indices[span.start : span.stop], step_batch.epoch)
            outputs, loss_sum, gradient_at_w = gradient(span, inputs, targets)
            step = STEP / (nn.utils.get_total_norm(gradient_at_w) + TINY)
            with perturbed(parameters, list(gradient_at_w), step), frozen_running_stats(strategy.model):
                *_, gradient_ahead = gradient(span, inputs, targets)
            own_targets = step_batch.num_targets(span)
            weight = own_targets / num_targets
            for total, g, ahead in zip(direction, gradient_at_w, gradient_ahead, strict=True):
                total += weight * (g + coefficient * (ahead - g) / step)
            objective.add_to(sums, outputs, targets, loss_sum, own_targets)
        with strategy.micro_step(last=True):  # the gradient of <p, direction> is direction; the all-reduce sums it
            linear = sum((p * d).sum() for p, d in zip(parameters, direction, strict=True))
            zero_contribution_pass(strategy, batches, step_batch.epoch, linear)
        return sums, None

    return compute_gradient
