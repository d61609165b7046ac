"""Runs whose network is an average of the weights along the way: exponential (EMA), or equal from a step on (SWA)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from gengap_dist.config import RunConfig
from gengap_dist.data.order import Order
from gengap_dist.data.resident import Batches
from gengap_dist.models.norm import average_buffers, has_batch_norm
from gengap_dist.recipes.course import Course
from gengap_dist.recipes.statistics import recompute
from gengap_dist.strategies import Strategy


@final
class Averaging(Course):
    """Every step's weights go into the average, from `first_step` on; before that the network is the one that trains.

    Running statistics of batch norm are averaged with EMA's weights, and recomputed for SWA's.
    """

    def __init__(self, config: RunConfig, strategy: Strategy, batches: Batches, order: Order, first_step: int) -> None:
        """See `Course`."""
        super().__init__(config, strategy, batches, order)
        self.first_step, recipe = first_step, config.recipe
        self.equal = recipe.average == "swa"
        average = get_swa_multi_avg_fn() if self.equal else _ema(recipe.ema_decay)
        self.average = AveragedModel(strategy.model, multi_avg_fn=average, use_buffers=True)

    def step(self, step: int, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
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
        return {"average": self.average.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `Course.load`."""
        self.average.load_state_dict(state["average"])


def _ema(decay: float) -> Any:
    """The average a becomes d a + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)) after n updates.

    The first weights would otherwise weigh more than all others in a run of fewer than 1 / (1 - decay) steps.
    """

    def update(averages: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, current, num_averaged)

    return torch.no_grad()(update)
