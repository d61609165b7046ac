"""Averages the weights of training steps for evaluation: exponentially (EMA), or equally from a given step (SWA)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, final

import torch
from torch import Tensor, nn

from gengap_dist.models.batch_norm import average_buffers, has_batch_norm
from gengap_dist.training.algorithms.base import AlgorithmSetup, TrainingAlgorithm, first_step_after
from gengap_dist.training.algorithms.update_bn import recompute_running_stats
from gengap_dist.training.step_metrics import StepResult


@final
class WeightAveraging(TrainingAlgorithm):
    """Averages the weights of every step from `first_step`; before that the trained network is evaluated.

    Running statistics of batch norm are averaged for EMA, and recomputed for SWA. (torch's AveragedModel counts updates
    in a tensor, which needs a GPU synchronisation in every step.)
    """

    def __init__(self, setup: AlgorithmSetup) -> None:
        """See `TrainingAlgorithm`."""
        algorithm = setup.config.algorithm
        self.is_swa = algorithm.weight_averaging == "swa"
        self.first_step = (
            first_step_after("algorithm.average_start", algorithm.average_start, setup.num_steps) if self.is_swa else 0
        )
        super().__init__(setup)
        self.average, self.num_averaged = deepcopy(setup.strategy.model), 0

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        """See `TrainingAlgorithm.step`."""
        out = super().step(step, lr, momentum)
        if step >= self.first_step:
            self._update_average()
        return out

    @torch.no_grad()
    def _update_average(self) -> None:
        """Add the trained weights to the average; the first weights are copied."""
        n, model = self.num_averaged, self.strategy.model
        weight = 1 / (n + 1) if self.is_swa else ema_weight(n, self.config.algorithm.ema_decay)
        pairs: list[tuple[Tensor, Tensor]] = [*zip(self.average.parameters(), model.parameters(), strict=True)]
        copied: list[tuple[Tensor, Tensor]] = []
        for average, new in zip(self.average.buffers(), model.buffers(), strict=True):
            (copied if self.is_swa or not average.is_floating_point() else pairs).append((average, new))
        for average, new in pairs:
            average.lerp_(new, weight if n else 1.0)
        for average, new in copied:
            average.copy_(new)
        self.num_averaged += 1

    @contextmanager
    def evaluated_model(self) -> Iterator[nn.Module]:
        """See `TrainingAlgorithm.evaluated_model`."""
        with super().evaluated_model() as model:
            if not self.num_averaged:
                yield model
                return
        average_buffers(self.average, self.strategy.world)
        if self.is_swa and has_batch_norm(self.average):
            recompute_running_stats(self.average, self.batches, self.strategy.world, self.config.batch.ghost_size)
        yield self.average

    def state(self) -> dict[str, Any]:
        """See `TrainingAlgorithm.state`."""
        average_buffers(self.average, self.strategy.world)
        state = {f"module.{name}": value for name, value in self.average.state_dict().items()}
        return super().state() | {"average": {"n_averaged": torch.tensor(self.num_averaged), **state}}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `TrainingAlgorithm.load`."""
        super().load(state)
        average = state["average"]
        self.num_averaged = int(average["n_averaged"])
        self.average.load_state_dict({name: average[f"module.{name}"] for name in self.average.state_dict()})


def ema_weight(num_averaged: int, decay: float) -> float:
    """1 - min(decay, (1 + n) / (10 + n)) after n updates.

    With the decay alone, the first weights would dominate in runs of fewer than 1 / (1 - decay) steps, such as runs
    with large batches.

    >>> [round(ema_weight(n, decay=0.75), 9) for n in (0, 10**6)]
    [0.9, 0.25]
    """
    return 1 - min(decay, (1 + num_averaged) / (10 + num_averaged))
