"""Runs whose network is an average of the weights along the way: exponential (EMA), or equal from a step on (SWA)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gengap_dist.config import RunConfig
from gengap_dist.data.order import Order
from gengap_dist.data.resident import Batches
from gengap_dist.models.norm import average_buffers, has_batch_norm
from gengap_dist.recipes.course import Course, Taken, first_of
from gengap_dist.recipes.statistics import recompute
from gengap_dist.strategies import Strategy

Tensors = tuple[Tensor, ...] | list[Tensor]


@final
class Averaging(Course):
    """Every step's weights go into the average, from `first_step` on; before that the network is the one that trains.

    Running statistics of batch norm are averaged with EMA's weights, and recomputed for SWA's.
    """

    def __init__(self, config: RunConfig, strategy: Strategy, batches: Batches, order: Order, num_steps: int) -> None:
        """See `Course`."""
        super().__init__(config, strategy, batches, order, num_steps)
        recipe = config.recipe
        self.equal = recipe.average == "swa"
        self.first_step = first_of("recipe.average_start", recipe.average_start, num_steps) if self.equal else 0
        mix: Any = None if self.equal else partial(_mix, decay=recipe.ema_decay)  # None: torch's equal mean
        self.average = AveragedModel(strategy.model, multi_avg_fn=mix, use_buffers=not self.equal)

    def step(self, step: int, lr: float, momentum: float) -> Taken:
        """See `Course.step`."""
        out = super().step(step, lr, momentum)
        if step >= self.first_step:
            self.average.update_parameters(self.strategy.model)
        return out

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """See `Course.network`."""
        with super().network() as model:
            if not self.average.n_averaged:
                yield model
                return
        average_buffers(self.average.module, self.strategy.world)
        if self.equal and has_batch_norm(self.average.module):
            recompute(self.average.module, self.batches, self.strategy.world, self.config.batch.ghost_size)
        yield self.average.module

    def state(self) -> dict[str, Any]:
        """See `Course.state`."""
        average_buffers(self.average.module, self.strategy.world)
        return {"average": self.average.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `Course.load`."""
        self.average.load_state_dict(state["average"])


def ema_weight(num_averaged: Tensor, decay: float) -> Tensor:
    """1 - min(decay, (1 + n) / (10 + n)) after n updates.

    With the decay alone the first weights would count more than all others in a run of fewer than 1 / (1 - decay)
    steps, as runs with large batches are.

    >>> [ema_weight(torch.tensor(n), decay=0.75).item() for n in (0, 10**6)]
    [0.9, 0.25]
    """
    n = num_averaged.double()
    return 1 - ((1 + n) / (10 + n)).clamp(max=decay)


@torch.no_grad()
def _mix(averages: Tensors, new: Tensors, num_averaged: Tensor, *, decay: float) -> None:
    """An update for AveragedModel: average + weight(n) * (new - average); what is no floating point is copied."""
    weight = ema_weight(num_averaged, decay)
    for average, value in zip(averages, new, strict=True):
        if average.is_floating_point():
            average.lerp_(value, weight.to(average.dtype))
        else:
            average.copy_(value)
