"""The numbers of a step, summed over ranks by one asynchronous all-reduce, and read while the next step computes."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.noise_scale import NoiseScale
from gengap_dist.training.loss_trigger import StepLoss
from gengap_dist.training.tasks import Task

Value = TypeVar("Value", Tensor, float)


class StepMetrics(NamedTuple, Generic[Value]):
    """Sums of one step: those of one rank, as float64 scalars on its device, or those over all ranks, as floats."""

    loss_sum: Value
    """Losses of the targets."""
    plain_loss_sum: Value
    """`Task.loss_sum`, where training minimizes another loss; else 0."""
    metric_sum: Value
    """`Task.metric_sum`, such as the number of correct predictions."""
    num_targets: Value
    """Targets that these two are sums of."""
    local_squared_norm: Value
    """|G_b|^2 of a rank's first micro-batch, for the noise scale; 0 if it is not tracked."""
    local_inverse_size: Value
    """1/b of the same micro-batch."""
    num_local_norms: Value
    """1 for each rank with such a micro-batch."""
    penalty: Value
    """Share of the penalty that is part of the objective."""
    penalty_grad_norm: Value
    """Share of the norm of what the penalty adds to the global gradient."""
    loss_grad_norm: Value
    """Share of the norm of the loss's global gradient without that of a penalty; 0 if there is none."""
    worker_squared_norm: Value
    """Share of the mean squared gradient norm over the workers of local SGD."""
    grad_norm: Value
    """Norm of the global gradient: only from rank 0, because all ranks have the same."""
    preemption_requests: Value
    """1 for each rank that was asked to stop."""


def zero_metrics(device: torch.device) -> StepMetrics[Tensor]:
    """Sums to which a rank adds in place."""
    return StepMetrics(*torch.zeros(len(StepMetrics._fields), dtype=torch.float64, device=device))


class StepResult(NamedTuple):
    """The result of a step on one rank."""

    size: int
    """Samples of the step, over all ranks."""
    lr: float
    """Learning rate."""
    sums: StepMetrics[Tensor]
    """Sums of this rank."""
    norm: Tensor | None
    """Norm of the global gradient; None: the root of `worker_squared_norm`, summed over ranks."""


class StepRecord(NamedTuple):
    """A step whose sums over all ranks are known; the same on every rank."""

    step: int
    """Number of the step, from 1."""
    loss: StepLoss
    """Without penalties and label smoothing."""
    not_finite: str
    """The metric that ends the run, because it is not finite: the loss or the gradient norm; or ''."""
    preempted: bool
    """Whether preemption was requested on a rank before the step ended."""
    metrics: dict[str, float]
    """What is recorded about the step."""


@final
class StepMetricsAggregator:
    """Sums the metrics of each step over ranks, without waiting for the others or for a GPU in the same step."""

    def __init__(self, config: RunConfig, task: Task, world: World) -> None:
        """For the steps of one run."""
        self.config, self.task, self.world = config, task, world
        self.noise_scale = NoiseScale()
        self._in_flight: deque[tuple[int, StepResult, Callable[[], Tensor]]] = deque()

    def add(self, step: int, result: StepResult, *, preemption_requested: bool) -> None:
        """Start the sum over ranks of the metrics of step number `step`, from 1. Collective."""
        sums = result.sums
        if self.world.rank == 0 and result.norm is not None:
            sums.grad_norm.copy_(result.norm)
        if preemption_requested:
            sums.preemption_requests.fill_(1.0)
        self._in_flight.append(
            (step, result, self.world.all_reduce_to_cpu_async(torch.stack(sums), "metrics of a step"))
        )

    def read(self, *, in_flight: int) -> Iterator[StepRecord]:
        """The records of the added steps, in order, except the last `in_flight`: their sums may not be ready.

        Collective: all ranks must read the same steps.
        """
        while len(self._in_flight) > in_flight:
            step, result, wait = self._in_flight.popleft()
            totals = StepMetrics[float](*wait().tolist())
            loss, mean = (total / max(1.0, totals.num_targets) for total in (totals.loss_sum, totals.metric_sum))
            metrics = {f"train/{name}": value for name, value in self.task.metrics(loss, mean).items()}
            metrics |= self._more_metrics(result, totals)
            ends_run = ["train/loss"]
            if self.config.train.autocast != "float16":  # there, a gradient that overflows is a skipped step
                ends_run.append("train/grad_norm")  # clipped by an infinite norm, a step would have length 0
            not_finite = next((name for name in ends_run if not math.isfinite(metrics[name])), "")
            plain = totals.plain_loss_sum if self.task.has_training_loss else totals.loss_sum
            step_loss = StepLoss(result.size, plain, totals.num_targets)
            yield StepRecord(step, step_loss, not_finite, totals.preemption_requests > 0, metrics)

    def _more_metrics(self, result: StepResult, totals: StepMetrics[float]) -> dict[str, float]:
        norm = totals.worker_squared_norm**0.5 if result.norm is None else totals.grad_norm
        metrics = {"train/grad_norm": norm, "train/lr": result.lr}
        if self.config.algorithm.rank_penalty is not None:
            metrics["train/rank_penalty"] = totals.penalty
            metrics["train/rank_penalty_grad_norm"] = totals.penalty_grad_norm
        if self.config.batch.schedule:
            metrics["train/global_size"] = result.size
        return metrics | self._noise_metrics(totals, norm, result.size)

    def _noise_metrics(self, totals: StepMetrics[float], norm: float, size: int) -> dict[str, float]:
        """The noise scale after a step, if it has gradients of two batch sizes."""
        count = totals.num_local_norms
        if not count or count / totals.local_inverse_size >= size:
            return {}
        norm = totals.loss_grad_norm or norm  # the small gradient is that of the loss
        if not math.isfinite(totals.local_squared_norm + norm):
            return {}
        self.noise_scale.add(totals.local_squared_norm / count, count / totals.local_inverse_size, norm**2, size)
        return self.noise_scale.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The averages of the noise scale; no step may be in flight."""
        return asdict(self.noise_scale)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.noise_scale = NoiseScale(**state)
