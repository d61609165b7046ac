"""Defines the training step and the model that is evaluated: plain training, and code shared by all algorithms."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from gengap_dist.config.sections import AlgorithmConfig, RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import BatchPlan, Span
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.gradient_penalty import gradient_penalty
from gengap_dist.training.algorithms.rank_penalty import RankPenalty
from gengap_dist.training.algorithms.sam import sam
from gengap_dist.training.step import ComputeGradient, Objective, StepBatch, targets_each, train_step
from gengap_dist.training.step_metrics import StepResult
from gengap_dist.training.tasks import Task


class AlgorithmSetup(NamedTuple):
    """What a training algorithm is made of."""

    config: RunConfig
    task: Task
    strategy: Strategy
    """Set up."""
    batches: BatchLoader
    sampler: EpochSampler
    """The order of the samples."""
    num_steps: int
    """Steps of the run."""


class TrainingAlgorithm:
    """Plain training with one strategy; the evaluated model is the trained one."""

    def __init__(self, setup: AlgorithmSetup) -> None:
        """Prepare the steps of a run.

        Raises:
            UsageError: if the network or the training set does not suit algorithm.rank_layers or rank_images.
        """
        config, task, strategy, batches, sampler, num_steps = setup
        algorithm = config.algorithm
        self.config, self.strategy, self.batches, self.sampler = config, strategy, batches, sampler
        self.num_steps = num_steps  # of the strategy; no prefetch beyond them
        self.objective, self.rank_images = Objective(task), None
        self.targets_each = targets_each(task, batches.samples.targets)
        if algorithm.rank_penalty is not None:
            if batches.samples.stream:
                raise UsageError(
                    f"algorithm.rank_penalty ({algorithm.rank_penalty:g}) measures samples from anywhere, and the "
                    f"iterable data set {config.data.name} is read in its own order: raise data.memory_gib "
                    f"({config.data.memory_gib:g}) until memory holds it"
                )
            self.objective = RankPenalty(config, task)
            example = partial(batches.plain, sampler.indices(0)[:1])
            self.rank_images = self.objective.check(strategy.model, example, len(batches.samples), strategy.world.size)
        self.compute_gradient = gradient_function(algorithm)
        self._spans: dict[int, list[Span]] = {}
        for phase in sampler.phases:
            spans = batch_plan_for(config, phase.size, strategy.world.size).micro_batches(strategy.world.rank)
            strategy.execution.compiled_sizes.update(span.size for span in spans)

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """Step number `step`, from 0. Collective."""
        self._seed(step, self.strategy.world.rank)
        self.strategy.set_rates(lr, momentum)
        step_batch = self._step_batch(step)
        if step + 1 < self.num_steps:
            next_batch = self._step_batch(step + 1)
            with self.strategy.world.timer.phase("data"):  # overlaps with the computation of this step
                own = slice(next_batch.spans[0].start, next_batch.spans[-1].stop)
                self.batches.prefetch(next_batch.indices[own], next_batch.epoch)
        return StepResult(
            len(step_batch.indices),
            lr,
            *train_step(self.strategy, self.batches, step_batch, self.objective, self.compute_gradient),
        )

    def _seed(self, step: int, stream: int) -> None:
        """Seed torch's generators, for layers that use them; torch.manual_seed takes 0.3 ms, mostly for other GPUs."""
        seed = ((self.config.seed * 1_000_003 + step) * 65_537 + stream) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.strategy.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _step_batch(self, step: int) -> StepBatch:
        world = self.strategy.world
        with world.timer.phase("data"):
            indices, epoch = self.sampler.indices(step), self.sampler.epoch(step)
        size = len(indices)
        if size not in self._spans:
            plan, equal_counts = (
                batch_plan_for(self.config, size, world.size),
                self.strategy.capabilities.sends_every_micro_batch,
            )
            self._spans[size] = plan.micro_batches(world.rank, equal_counts=equal_counts)
        return StepBatch(indices, epoch, self._spans[size], (self.config.seed, step), self.targets_each)

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """The unsharded trained network, as saved in checkpoints; see `Strategy.unsharded_model`. Collective."""
        return self.strategy.unsharded_model()

    def evaluated_model(self) -> AbstractContextManager[nn.Module]:
        """The unsharded network to evaluate, on every rank; see `Strategy.unsharded_model`. Collective.

        The buffers of the trained network must be averaged before.
        """
        return self.unsharded_model()

    def state(self) -> dict[str, Any]:
        """The state besides the strategy's network and optimizer; complete on rank 0. Collective."""
        objective = self.objective.state()
        return {"objective": objective} if objective else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which is complete on every rank. Collective."""
        self.objective.load(state.get("objective", {}))

    def info(self) -> dict[str, Any]:
        """What run.json says about it."""
        return {} if self.rank_images is None else {"rank_images": self.rank_images}


def first_step_after(setting: str, share: float, num_steps: int) -> int:
    """The first step, from 0, of the last part of a run, after the fraction `share` of its steps.

    >>> first_step_after("algorithm.average_start", 0.75, num_steps=10)
    8

    Raises:
        UsageError: if no step remains.
    """
    if (first := round(share * num_steps)) < num_steps:
        return first
    raise UsageError(
        f"{setting} ({share:g}) leaves none of {num_steps} steps after it: choose a smaller value, or a longer run"
    )


def batch_plan_for(config: RunConfig, size: int, num_ranks: int) -> BatchPlan:
    """How a global batch of `size` is split over `num_ranks` ranks; each group of a penalty is one micro-batch."""
    batch, group = config.batch, config.algorithm.penalty_size
    if group:
        return BatchPlan(size, num_ranks, group, group)
    return BatchPlan(size, num_ranks, batch.max_micro_size, batch.ghost_size)


def gradient_function(algorithm: AlgorithmConfig) -> ComputeGradient | None:
    """The function that computes the direction of a step; None: the plain gradient."""
    if algorithm.sam_rho is not None:
        return sam(algorithm.sam_rho)
    if algorithm.gradient_penalty is not None:
        return gradient_penalty(algorithm.gradient_penalty)
    return None
