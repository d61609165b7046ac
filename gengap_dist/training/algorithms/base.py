"""How a run goes from step to step, and which network it stands for; plain training, and what all algorithms share."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gengap_dist.config.sections import AlgorithmConfig, RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import BatchPlan, Span
from gengap_dist.errors import UsageError
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.gradient_penalty import gradient_penalty
from gengap_dist.training.algorithms.rank_penalty import RankPenalty
from gengap_dist.training.algorithms.sam import sam
from gengap_dist.training.step import ComputeGradient, Objective, StepBatch, train_step


class StepResult(NamedTuple):
    """What one rank knows of a step."""

    size: int
    """Samples behind it, over all ranks."""
    lr: float
    """The rate it was taken at."""
    sums: Tensor
    """This rank's, see `accumulate`."""
    norm: Tensor | None
    """Of the global gradient; None: the root of the last of the sums, over all ranks."""


class TrainingAlgorithm:
    """One strategy's steps; the network of the run is the one that trains."""

    def __init__(
        self, config: RunConfig, strategy: Strategy, batches: BatchLoader, order: EpochSampler, num_steps: int
    ) -> None:
        """The course of `strategy`, which is set up, over `batches` in `order`, for `num_steps` steps.

        Raises:
            UsageError: if algorithm.rank_layers names a layer that the network does not have.
        """
        algorithm = config.algorithm
        self.config, self.strategy, self.batches, self.order = config, strategy, batches, order
        self.num_steps = num_steps  # that the strategy takes; what comes after them is not read ahead
        self.objective = Objective(algorithm.label_smoothing)
        if algorithm.rank_penalty is not None:
            self.objective = RankPenalty(algorithm)
            self.objective.layers(strategy.model, lambda: batches(order.indices(0)[:1], 0)[0])
        self.make = make_gradient(algorithm)
        self._spans: dict[int, list[Span]] = {}
        for phase in order.phases:
            spans = batch_plan_for(config, phase.size, strategy.world.size).micro_batches(strategy.world.rank)
            strategy.compiled_batch_sizes.update(span.size for span in spans)

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """Step number `step`, from 0. Collective."""
        self._seed(step, self.strategy.world.rank)
        self.strategy.set_rates(lr, momentum)
        work = self._work(step)
        if step + 1 < self.num_steps:
            coming = self._work(step + 1)
            with self.strategy.world.timer.phase("data"):  # what is coming is read while this step computes
                self.batches.prefetch(coming.indices[coming.spans[0].start : coming.spans[-1].stop])
        return StepResult(
            len(work.indices), lr, *train_step(self.strategy, self.batches, work, self.objective, self.make)
        )

    def _seed(self, step: int, who: int) -> None:
        """For layers that ask torch for their draws; torch.manual_seed takes 0.3 ms, most of it for other devices."""
        seed = ((self.config.seed * 1_000_003 + step) * 65_537 + who) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.strategy.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _work(self, step: int) -> StepBatch:
        world = self.strategy.world
        with world.timer.phase("data"):
            indices, epoch = self.order.indices(step), self.order.epoch(step)
        size = len(indices)
        if size not in self._spans:
            plan, lockstep = batch_plan_for(self.config, size, world.size), self.strategy.equal_micro_batches_required
            self._spans[size] = plan.micro_batches(world.rank, equal_counts=lockstep)
        return StepBatch(indices, epoch, self._spans[size], (self.config.seed, step))

    def unsharded_model(self) -> AbstractContextManager[nn.Module]:
        """The plain network that trains, as checkpoints keep it; see `Strategy.unsharded_model`. Collective."""
        return self.strategy.unsharded_model()

    def evaluated_model(self) -> AbstractContextManager[nn.Module]:
        """The plain network that the run stands for, on every rank, to look at; see `Strategy.unsharded_model`. Collective.

        Buffers of the network that trains are to be averaged before.
        """
        return self.unsharded_model()

    def state(self) -> dict[str, Any]:
        """What it remembers besides the strategy's network and optimizer; whole on rank 0. Collective."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which is whole on every rank. Collective."""


def first_step_after(setting: str, share: float, num_steps: int) -> int:
    """The step, from 0, with which the last part of a run begins, after `share` of its steps.

    >>> first_step_after("algorithm.average_start", 0.75, num_steps=10)
    8

    Raises:
        UsageError: if nothing is left.
    """
    if (first := round(share * num_steps)) < num_steps:
        return first
    raise UsageError(f"{setting} ({share:g}) leaves none of {num_steps} steps after it: choose less, or a longer run")


def batch_plan_for(config: RunConfig, size: int, num_ranks: int) -> BatchPlan:
    """How a global batch of `size` is cut among so many ranks: a penalty's groups are micro-batches of their own."""
    batch, group = config.batch, config.algorithm.penalty_size
    if group:
        return BatchPlan(size, num_ranks, group, group)
    return BatchPlan(size, num_ranks, batch.max_micro_size, batch.ghost_size)


def make_gradient(algorithm: AlgorithmConfig) -> ComputeGradient | None:
    """How this algorithm makes a step's direction; None: as plain training does."""
    if algorithm.sam_rho is not None:
        return sam(algorithm.sam_rho)
    if algorithm.gradient_penalty is not None:
        return gradient_penalty(algorithm.gradient_penalty)
    return None
