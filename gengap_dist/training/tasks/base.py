"""What a network learns: the loss of a batch, what is counted, and the metric that runs are compared by."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.runs.metric import MetricDescription

TOLERANCE = 1e-3  # relative difference of two sums in float32 that add the same numbers in another order


class Task(ABC):
    """Base class. All tensors have the n samples of a micro-batch first; the rest is as in the `DataSpec`.

    A loss is a sum over targets, and the loss of a step is the sum over the global batch, divided by its number of
    targets: so it does not depend on ranks and micro-batches. An image has one target, its class; a sequence may have
    one for every token.
    """

    def __init__(self, spec: DataSpec) -> None:
        """A task on samples as in `spec`.

        Raises:
            UsageError: if it does not fit them.
        """
        self.spec = spec

    @property
    def metric(self) -> MetricDescription:
        """The metric that runs are compared by; its name is a key of `metrics`. Default: the loss."""
        return MetricDescription(name="loss", unit="", higher_is_better=False)

    @abstractmethod
    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, summed over the targets of a micro-batch: a scalar. Training, evaluation and probes use it."""

    def training_loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that training minimizes, summed; it may differ from the one that is evaluated."""
        return self.loss_sum(outputs, targets)

    @property
    def has_training_loss(self) -> bool:
        """Whether `training_loss_sum` differs from `loss_sum`. Default: if a subclass defines it."""
        return type(self).training_loss_sum is not Task.training_loss_sum

    def num_targets(self, targets: Tensor) -> Tensor:
        """The number of targets that each sample has in the sums: [n] int64. Default: one."""
        return torch.ones(len(targets), dtype=torch.int64, device=targets.device)

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A second sum over targets, of which `metrics` gets the mean: a scalar. Default: 0."""
        return torch.zeros((), device=outputs.device)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Whether the network is right about each sample, [n] bool. Default: None, samples are not right or wrong."""
        return None

    def chance(self, targets: Tensor) -> float | None:
        """The metric of a network that has learned nothing, from the training targets [N, ...]. Default: not known."""
        return self.metric.chance

    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        """What is recorded of a set of samples, by name, with `loss` first.

        Args:
            loss: `loss_sum` over all samples, divided by their number of targets.
            mean: likewise of `metric_sum`.
        """
        return {"loss": loss}

    @final
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse a task whose losses are not sums over targets, found with the same samples once and twice.

        Args:
            outputs: of the network for a few samples, without gradient.
            targets: of the same samples.

        Raises:
            UsageError: names the method and what it should return.
        """
        name = type(self).__name__
        twice = torch.cat([outputs, outputs]), torch.cat([targets, targets])
        for method in (self.loss_sum, self.training_loss_sum, self.metric_sum):
            once, doubled = self._checked_call(method, outputs, targets), self._checked_call(method, *twice)
            if once.numel() != 1 or doubled.numel() != 1:
                raise UsageError(
                    f"{name}.{method.__name__} returns a tensor of shape {list(once.shape)}: return one number, the "
                    "sum over all targets"
                )
            if (doubled - 2 * once).abs() > TOLERANCE * doubled.abs().clamp(min=once.abs()):
                raise UsageError(
                    f"{name}.{method.__name__} returns {float(once):.4g} for {len(targets)} samples and "
                    f"{float(doubled):.4g} for the same samples twice, which is not a sum: return the sum over all "
                    'targets, not their mean (reduction="sum")'
                )
        counts = self.num_targets(targets)
        if counts.shape != (len(targets),) or (counts < 0).any():
            raise UsageError(
                f"{name}.num_targets returns {counts!r:.80} for {len(targets)} samples: return the number of targets "
                "of each sample, [n] int64"
            )
        right = self._checked_call(self.correct, outputs, targets)
        if right is not None and (right.shape != (len(targets),) or right.dtype != torch.bool):
            raise UsageError(
                f"{name}.correct returns {str(right.dtype).removeprefix('torch.')} of shape {list(right.shape)} for "
                f"{len(targets)} samples: return whether each sample is right, [n] bool, or None"
            )
        recorded = self.metrics(0.0, 0.0)
        if "loss" not in recorded:
            raise UsageError(f"{name}.metrics returns {', '.join(recorded)}, needs loss, too: add it")
        if self.metric.name not in recorded:
            raise UsageError(
                f"{name}.metric is called {self.metric.name}, and {name}.metrics returns {', '.join(recorded)}: make "
                "its name one of them"
            )

    def _checked_call(self, method: Callable[[Tensor, Tensor], Any], outputs: Tensor, targets: Tensor) -> Any:
        try:
            return method(outputs, targets)
        except Exception as error:  # a user's task may raise anything
            raise UsageError(
                f"{type(self).__name__}.{method.__name__} failed on outputs of shape {list(outputs.shape)} and targets "
                f"of shape {list(targets.shape)} ({type(error).__name__}: {error}): fix it, or choose another data set"
            ) from error
