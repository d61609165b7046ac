"""A second task, as a user would write it: regression on a table, and one with a ragged number of targets."""

import numpy as np
import torch
from torch import Tensor

from gengap_dist.training.tasks import MetricDescription, Task

NUM_COLUMNS, NUM_TARGETS, MASKED = 6, 4, 99.0


def rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A noisy smooth function of six columns."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(330, NUM_COLUMNS))
    targets = np.sin(inputs @ rng.normal(size=NUM_COLUMNS)) + 0.1 * rng.normal(size=330)
    return {"train": (inputs[:250], targets[:250]), "test": (inputs[250:], targets[250:])}


def masked_rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Four targets a row, of which none to four are known."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(330, NUM_COLUMNS))
    targets = np.tanh(inputs @ rng.normal(size=(NUM_COLUMNS, NUM_TARGETS)))
    targets[np.arange(NUM_TARGETS) >= rng.integers(0, NUM_TARGETS + 1, size=330)[:, None]] = MASKED
    return {"train": (inputs[:250], targets[:250]), "test": (inputs[250:], targets[250:])}


class Regression(Task):
    """Squared error; runs are compared by the mean absolute error, of which less is better."""

    @property
    def metric(self) -> MetricDescription:
        return MetricDescription(name="mae", unit="m", higher_is_better=False)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.to(outputs.dtype)).square().sum()

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.to(outputs.dtype)).abs().sum()

    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        return {"loss": loss, "mae": mean}


class MaskedRegression(Regression):
    """The same over the targets that are known."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss_sum(torch.where(targets == MASKED, MASKED, outputs), targets)

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().metric_sum(torch.where(targets == MASKED, MASKED, outputs), targets)

    def num_targets(self, targets: Tensor) -> Tensor:
        return (targets != MASKED).sum(1)


class Mean(Regression):
    """The mistake that is easy to make."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss_sum(outputs, targets) / len(targets)


class Vector(Regression):
    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()


class Raises(Regression):
    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("no such column")


class Renamed(Regression):
    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        return {"loss": loss}


class Counts(Regression):
    def num_targets(self, targets: Tensor) -> Tensor:
        return torch.tensor(len(targets))


def ragged() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": (np.zeros((5, 2)), np.zeros(4)), "test": (np.zeros((5, 2)), np.zeros(5))}


def unequal() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": (np.zeros((5, 2)), np.zeros(5)), "test": (np.zeros((5, 3)), np.zeros(5))}


def words() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": (np.zeros((5, 2), dtype=np.int64), np.zeros(5)), "test": (np.zeros((5, 2)), np.zeros(5))}


def missing() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"test": (np.zeros((5, 2)), np.zeros(5))}


def infinite() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"train": (np.full((5, 2), np.inf), np.zeros(5)), "test": (np.zeros((5, 2)), np.zeros(5))}


def fails() -> None:
    raise KeyError("column 7")
