"""Runs whose network is an average of the weights along the way: exponential (EMA), or equal from a step on (SWA)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, final

import torch
from torch import Tensor, nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.models.batch_norm import average_buffers, has_batch_norm
from gengap_dist.parallel.strategies import Strategy
from gengap_dist.training.algorithms.base import StepResult, TrainingAlgorithm, first_step_after
from gengap_dist.training.algorithms.update_bn import recompute_running_stats


@final
class WeightAveraging(TrainingAlgorithm):
    """Every step's weights go into the average, from `first_step` on; before that the network is the one that trains.

    Running statistics of batch norm are averaged with EMA's weights, and recomputed for SWA's. (torch's AveragedModel
    counts updates in a tensor, for which a GPU is waited for in every step.)
    """

    def __init__(
        self, config: RunConfig, strategy: Strategy, batches: BatchLoader, order: EpochSampler, num_steps: int
    ) -> None:
        """See `TrainingAlgorithm`."""
        super().__init__(config, strategy, batches, order, num_steps)
        algorithm = config.algorithm
        self.equal = algorithm.weight_averaging == "swa"
        self.first_step = (
            first_step_after("algorithm.average_start", algorithm.average_start, num_steps) if self.equal else 0
        )
        self.average, self.num_averaged = deepcopy(strategy.model), 0

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """See `TrainingAlgorithm.step`."""
        out = super().step(step, lr, momentum)
        if step >= self.first_step:
            self._add()
        return out

    @torch.no_grad()
    def _add(self) -> None:
        """Let the weights that train enter the average; the first are the average."""
        n, model = self.num_averaged, self.strategy.model
        weight = 1 / (n + 1) if self.equal else ema_weight(n, self.config.algorithm.ema_decay)
        pairs: list[tuple[Tensor, Tensor]] = [*zip(self.average.parameters(), model.parameters(), strict=True)]
        copied: list[tuple[Tensor, Tensor]] = []
        for average, new in zip(self.average.buffers(), model.buffers(), strict=True):
            (copied if self.equal or not average.is_floating_point() else pairs).append((average, new))
        for average, new in pairs:
            average.lerp_(new, weight if n else 1.0)
        for average, new in copied:
            average.copy_(new)
        self.num_averaged += 1

    @contextmanager
    def evaluated_model(self) -> Iterator[nn.Module]:
        """See `TrainingAlgorithm.network`."""
        with super().evaluated_model() as model:
            if not self.num_averaged:
                yield model
                return
        average_buffers(self.average, self.strategy.world)
        if self.equal and has_batch_norm(self.average):
            recompute_running_stats(self.average, self.batches, self.strategy.world, self.config.batch.ghost_size)
        yield self.average

    def state(self) -> dict[str, Any]:
        """See `TrainingAlgorithm.state`."""
        average_buffers(self.average, self.strategy.world)
        state = {f"module.{name}": value for name, value in self.average.state_dict().items()}
        return {"average": {"n_averaged": torch.tensor(self.num_averaged), **state}}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `TrainingAlgorithm.load`."""
        average = state["average"]
        self.num_averaged = int(average["n_averaged"])
        self.average.load_state_dict({name: average[f"module.{name}"] for name in self.average.state_dict()})


def ema_weight(num_averaged: int, decay: float) -> float:
    """1 - min(decay, (1 + n) / (10 + n)) after n updates.

    With the decay alone the first weights would count more than all others in a run of fewer than 1 / (1 - decay)
    steps, as runs with large batches are.

    >>> [round(ema_weight(n, decay=0.75), 9) for n in (0, 10**6)]
    [0.9, 0.25]
    """
    return 1 - min(decay, (1 + num_averaged) / (10 + num_averaged))
