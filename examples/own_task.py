"""Train a task of your own: regression, with the mean absolute error as metric: python examples/own_task.py [OUT]."""

import sys
from pathlib import Path

import torch

from gengap_dist.config import loading, sections
from gengap_dist.training.tasks import MetricDescription, Task
from gengap_dist.training.trainer import run

SETTINGS = {"task.name": "own_task:Regression", "data.name": "own_task:table", "model.name": "mlp",
            "model.norm": "none", "model.widths": [64], "train.epochs": 20, "mlflow.enabled": False}  # fmt: skip


def table() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(1_000, 4, generator=torch.Generator().manual_seed(0))
    return {"train": (inputs, inputs[:, 0].sin() + inputs[:, 1].square())}  # a tenth of the rows becomes the test part


class Regression(Task):  # what task.name names
    @property
    def metric(self) -> MetricDescription:
        return MetricDescription(name="error", unit="m", higher_is_better=False)

    def loss_sum(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # a sum over targets, not a mean
        return (outputs - targets).square().sum()

    def metric_sum(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).abs().sum()

    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        return {"loss": loss, "error": mean}


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/regression")
    result = run(loading.validate(sections.RunConfig, loading.nested(SETTINGS)), out)
    print(f"regression: test error {result['test/error']:.3f} m after {result['num_steps']} steps")
