"""Sharpness-aware minimization (SAM, Foret et al. 2021): the gradient at a point of higher loss nearby."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.step import ComputeGradient, Objective, StepBatch, accumulate
from gengap_dist.training.step_metrics import StepMetrics

TINY = 1e-12


@contextmanager
def perturbed(parameters: list[nn.Parameter], directions: list[Tensor], scale: Tensor) -> Iterator[None]:
    """While open, parameters are parameters + scale * directions; then they are restored exactly."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, direction in zip(parameters, directions, strict=True):
            p.add_(direction * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def sam(rho: float) -> ComputeGradient:
    """The global batch's gradient at w + rho g / |g|, g its gradient at w (Foret et al. 2021, with m = global size)."""

    def compute_gradient(
        strategy: Strategy, batches: BatchLoader, step_batch: StepBatch, objective: Objective
    ) -> tuple[StepMetrics[Tensor], Tensor]:
        sums = accumulate(strategy, batches, step_batch, objective)
        scaled_norm = strategy.gradient_norm()
        parameters = [p for p in strategy.model.parameters() if p.grad is not None]
        ascent = [p.grad.clone() for p in parameters if p.grad is not None]
        strategy.optimizer.zero_grad(set_to_none=False)
        track_norm, strategy.track_local_grad_norm = strategy.track_local_grad_norm, False
        with perturbed(parameters, ascent, rho / (scaled_norm + TINY)), frozen_running_stats(strategy.model):
            accumulate(strategy, batches, step_batch, objective)
        strategy.track_local_grad_norm = track_norm
        return sums, strategy.execution.unscaled(scaled_norm)

    return compute_gradient
